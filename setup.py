"""Packages and dependencies of tfdp; `constraints.txt` has the exact versions that the tests run with."""

from pathlib import Path

from setuptools import find_packages, setup

TENSORFLOW = "2.21.*"

setup(
    name="tfdp",
    version="0.1.0",
    description="Data-parallel training of GPT language models on TensorFlow and Keras 3",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["tfdp*", "trainers*"]),
    install_requires=[
        f"tensorflow=={TENSORFLOW}",
        "keras==3.15.*",
        "keras-nlp>=0.32",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",  # tensorflow-datasets 4.9.10 imports it without declaring it
        "tensorboard",
        "numpy",
        "pyarrow",
        "zstandard",
        "tokenizers",
        "tiktoken",
        "sentencepiece",
        "safetensors",
        "jinja2",  # the language of chat templates
        "sacrebleu",  # BLEU and chrF, ROUGE, and word error rates
        "rouge-score",
        "jiwer",
        "pillow",  # draws the confusion matrix
        "jsonargparse[signatures]>=4.49",
        "pyyaml",
    ],
    extras_require={
        "gpu": [f"tensorflow[and-cuda]=={TENSORFLOW}"],
        "onnx": ["tf2onnx>=1.17", "onnx"],  # for `tfdp.export --format onnx`
        # what tfdp is measured beside, and compared with
        "peers": [
            "torch>=2.13",
            "transformers>=5",
            "peft>=0.21",
            "lm-eval>=0.4.13",
            "gguf",
            "tf2onnx>=1.17",
            "onnx",
            "onnxruntime",
            "scikit-learn",
        ],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "import-linter",
            "types-PyYAML",
        ],
    },
)

"""The bits of small runs of every kind, to compare two trees: `python benchmarks/digests.py [--only NAME ...]`.

Prints a line for each run: its name, and how weights_sha256 and state_sha256 of its summary.json begin. A change of
the code that changes no arithmetic prints the same on the same machine:

    python benchmarks/digests.py > before.txt; git switch other; python benchmarks/digests.py | diff before.txt -

It needs nothing of tfdp but its commands, so it runs on trees of any age. Each run is a process of its own; all take
about six minutes on two cores.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

WORDS = ["alpha", "beta", "gamma", "delta", "(x)", "return", "été", "\n"]
SMALL = {
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.model_dim": 64,
    "model.context_length": 64,
    "training.steps": 12,
    "training.global_batch_size": 8,
    "training.evaluate_every": 6,
    "training.sample_tokens": 0,
    "data.source": "text:text/*.txt",
    "data.validation_fraction": 0.2,
    "checkpoint.every_steps": 6,
}
CANONICAL = {"distribution.reduction": "canonical", "training.microbatch_size": 2}
TWO_REPLICAS = {"distribution.num_replicas": 2}
HALF, WHOLE = {"training.steps": 6}, {"training.steps": 12}

# name -> workers, and the keys of each command, one after the other in one run directory
RUNS: dict[str, tuple[int, Sequence[Mapping[str, object]]]] = {
    "defaults": (1, [{}]),
    **{
        name: (1, [{"optimizer.name": name, "optimizer.learning_rate": rate}])
        for name, rate in {
            "adamw": 0.003,
            "adam": 0.003,
            "sgd": 0.1,
            "momentum": 0.01,
            "rmsprop": 0.001,
            "lion": 0.0003,
            "adafactor": 0.003,
        }.items()
    },
    "bfloat16": (1, [{"training.precision": "bfloat16"}]),
    "float16": (1, [{"training.precision": "float16"}]),
    "without XLA": (1, [{"training.jit_compile": False}]),
    "accumulation, dropout": (1, [{"training.microbatch_size": 2, "model.dropout": 0.1}]),
    "canonical": (1, [CANONICAL]),
    "canonical, 2 replicas": (1, [{**CANONICAL, **TWO_REPLICAS}]),
    "canonical, 2 workers": (2, [CANONICAL]),
    "2 replicas, bfloat16 on the wire": (1, [{**TWO_REPLICAS, "distribution.wire_dtype": "bfloat16"}]),
    "2 replicas, verified": (1, [{**TWO_REPLICAS, "training.verify_every": 3}]),
    "2 workers": (2, [{}]),
    "mixture": (1, [{"data.source": "0.75 * text:text/*.txt + 0.25 * text:other/*.txt"}]),
    "documents": (1, [{"data.source": "text:short/*.txt", "data.document_attention": True}]),
    "a document a row": (1, [{"data.source": "text:short/*.txt", "data.sequences": "documents"}]),
    "rematerialisation": (1, [{"training.remat": True}]),
    "GPT-2's layers": (
        1,
        [
            {
                "model.position": "learned",
                "model.norm": "layer_norm",
                "model.activation": "gelu",
                "model.use_bias": True,
                "model.qk_norm": False,
                "model.tie_embeddings": True,
            }
        ],
    ),
    "resumed": (1, [HALF, WHOLE]),
    "resumed by 2 replicas": (1, [{**CANONICAL, **HALF}, {**CANONICAL, **WHOLE, **TWO_REPLICAS}]),
}


def write_text(folder: Path) -> None:
    """Eight documents, four others, and eighty that are shorter than a row."""
    generator = random.Random(0)
    for name, count, num_words in (("text", 8, 600), ("other", 4, 600), ("short", 80, 6)):
        (folder / name).mkdir()
        for index in range(count):
            text = " ".join(generator.choices(WORDS, k=num_words))
            (folder / name / f"{index}.txt").write_text(text, encoding="utf-8")


def digests(folder: Path, name: str) -> tuple[str, str]:
    """Carries out one of `RUNS` in a folder with the text."""
    num_workers, commands = RUNS[name]
    launcher = ["-m", "tfdp.launch", "--num_workers", str(num_workers), "--"]
    program = launcher if num_workers > 1 else ["-m", "tfdp.train"]
    run_dir = f"runs/{name}"
    for keys in commands:
        arguments = [f"--{key}={value}" for key, value in {**SMALL, "data.cache_dir": "cache", **keys}.items()]
        command = [sys.executable, *program, f"--run_dir={run_dir}", *arguments]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(f"{name}: {' '.join(command)} ended with {result.returncode}:\n{result.stderr}")
    summary = json.loads((folder / run_dir / "summary.json").read_text(encoding="utf-8"))
    return summary["weights_sha256"], summary["state_sha256"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the digests of small runs of every kind.")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help="of these runs")
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder))
        for name in parser.parse_args().only:
            weights, state = digests(Path(folder), name)
            print(f"{name:<34} {weights[:16]} {state[:16]}", flush=True)


if __name__ == "__main__":
    main()

"""Shared by all tests: eight logical CPU devices, a cache of their own, and small runs to compare."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tfdp.system.startup import load_tensorflow

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tfdp-tests-")
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # for processes that tests start
load_tensorflow()

import tensorflow as tf  # noqa: E402

from tfdp.config.sections import (  # noqa: E402
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from trainers.causal_lm import Config  # noqa: E402

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration() for _ in range(8)]
)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name bytes by their number: packed bytes may hold the time, and each process must give a test the same name."""
    return f"{len(val)}-bytes" if isinstance(val, bytes) and len(val) > 8 else None


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight documents of words drawn from a small vocabulary: text that a tiny model can learn from."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    words = np.array(["alpha", "beta", "gamma", "delta", "(x)", "return", "été", "\n"])
    for index in range(8):
        (folder / f"{index}.txt").write_text(" ".join(generator.choice(words, 400)), encoding="utf-8")
    return folder


@pytest.fixture
def tiny_config(corpus_dir: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes configurations of a tiny run; the arguments replace fields of its sections, or whole fields."""
    base = Config(
        run_dir=str(tmp_path / "run"),
        seed=3,
        model=ModelConfig(num_layers=1, num_heads=2, model_dim=16, context_length=16),
        data=DataConfig(source=f"text:{corpus_dir}/*.txt", validation_fraction=0.2),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2, warmup_steps=5, schedule="constant"),
        training=TrainingConfig(
            steps=20, global_batch_size=12, log_every=1, evaluate_every=0, sample_tokens=0, jit_compile=False
        ),
        checkpoint=CheckpointConfig(every_steps=0),
    )

    def make(name: str = "run", **sections: dict[str, object]) -> Config:
        config = replace(base, run_dir=str(tmp_path / name))
        for section, changes in sections.items():
            config = replace(config, **{section: replace(getattr(config, section), **changes)})
        return config

    return make

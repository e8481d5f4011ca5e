"""Weights that are not trained: saved once, verified, restored; and no step touches them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tfdp.inference.trained import TrainedModel
from tfdp.system.exits import ConfigError
from tfdp.training.checkpoint import CheckpointFolder, SaveFailed
from trainers import causal_lm
from trainers.causal_lm import Config

RECIPE = """
from tfdp.models.gpt import GPT
from trainers.causal_lm import Config, make_sequences, make_task, weight_shapes

def make_model(config, vocab_size, fuse):
    model = GPT(config.model, vocab_size, config.seed + {}, config.training.precision, config.training.remat, fuse)
    model.blocks[0].trainable = False
    return model
"""


@pytest.fixture
def make(tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Configurations of a model of two blocks, the first of which is frozen."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "of_frozen").mkdir()
    for name, seed in (("recipe", 0), ("other", 1)):  # the other one would begin with other weights
        (tmp_path / "of_frozen" / f"{name}.py").write_text(RECIPE.format(seed))

    def made(name: str, steps: int, recipe: str = "recipe", remat: bool = False) -> Config:
        config = tiny_config(
            name, model={"num_layers": 2}, training={"steps": steps, "remat": remat}, checkpoint={"every_steps": 2}
        )
        return replace(config, trainer=f"of_frozen.{recipe}")

    return made


def files_of(config: Config) -> list[Path]:
    return sorted(Path(str(config.run_dir), "checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_frozen_weights_are_saved_once_and_come_back(make: Callable[..., Config], remat: bool) -> None:
    whole = causal_lm.train(make("whole", 8, remat=remat))
    begun = make("halves", 4, remat=remat)
    causal_lm.train(begun)
    (frozen,) = files_of(begun)
    saved = safetensors.numpy.load_file(frozen)
    assert saved.keys() and all(name.startswith("block_0/") for name in saved)
    for step in (2, 4):
        trained = safetensors.numpy.load_file(frozen.parent / f"step_0000000{step}" / "weights.safetensors")
        assert trained.keys() and not trained.keys() & saved.keys()

    # whoever goes on has the frozen weights of the run, not those that its model begins with
    halves = causal_lm.train(make("halves", 8, "other", remat))
    assert files_of(begun) == [frozen]
    for key in ("weights_sha256", "state_sha256", "validation_loss", "num_params"):
        assert halves[key] == whole[key], key
    model = TrainedModel.open(str(begun.run_dir), "newest", "read back").make_model()
    for name, weight in model.named_frozen_weights().items():
        np.testing.assert_array_equal(weight.numpy(), saved[name])


@pytest.mark.parametrize("damage", ["flip", "lose"])
def test_damaged_frozen_weights_are_refused(make: Callable[..., Config], damage: str) -> None:
    config = make("run", 4)
    causal_lm.train(config)
    (frozen,) = files_of(config)
    data = bytearray(frozen.read_bytes())
    data[-5] ^= 4
    frozen.unlink()
    if damage == "flip":
        frozen.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"no checkpoint in .* is whole: .*{frozen.name}"):
        causal_lm.train(make("run", 8))
    with pytest.raises(ConfigError, match=rf"^checkpoint .*{frozen.name}"):
        TrainedModel.open(str(config.run_dir), "newest", "read back")


def test_what_cannot_be_given_back_is_refused_before_it_is_saved(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    kinds = {name: np.zeros(3, name) for name in ("bool", "uint32", "int8", "float16", "float64")}
    path = folder.folder / f"frozen_{folder.save_frozen(kinds)[:16]}.safetensors"
    assert {name: tensor.dtype.name for name, tensor in safetensors.numpy.load_file(path).items()} == {
        name: name for name in kinds
    }
    with pytest.raises(SaveFailed, match=r"^a/b cannot be saved: its type is complex64, not one of numbers or truth"):
        folder.save_frozen({"a/b": np.zeros(3, np.complex64)})
    (tmp_path / "file").write_text("")
    with pytest.raises(
        SaveFailed, match=r"^the frozen weights cannot be saved in .*; it needs 12 bytes, .* are free; "
    ):
        CheckpointFolder(tmp_path / "file").save_frozen({"a": np.zeros(3, np.float32)})


def test_a_run_without_frozen_weights_saves_none(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(training={"steps": 2})
    causal_lm.train(config)
    assert not files_of(config)
    shutil.rmtree(str(config.run_dir))

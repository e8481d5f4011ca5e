"""A checkpoint is whole or not there, and the right ones are kept."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tfdp.system.exits import ConfigError
from tfdp.training import checkpoint
from tfdp.training.checkpoint import Checkpoint, CheckpointFolder
from tfdp.training.weights import digests_of


def make(step: int, validation_loss: float | None = None) -> Checkpoint:
    generator = np.random.default_rng(step)
    weights = {"a": generator.normal(size=(3, 4)).astype(np.float32), "b": np.float32(step).reshape(())}
    optimizer = {"00000/m": generator.normal(size=5).astype(np.float32)}
    return Checkpoint(weights, optimizer, {"step": step, "validation_loss": validation_loss})


def same(a: Checkpoint, b: Checkpoint) -> bool:
    groups = ((a.weights, b.weights), (a.optimizer, b.optimizer))
    return all(x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in groups)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.save(make(7))
    loaded, warnings = folder.load_newest()
    assert loaded is not None
    assert loaded.step == 7
    assert same(loaded, make(7))
    assert warnings == []


def test_no_checkpoints_is_no_error(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "none").load_newest() == (None, [])


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        folder.save(make(step, loss))
    assert folder.steps() == [2, 4, 5]
    assert folder.best_step() == 2


class Crash(Exception):
    pass


def crash_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The count-th call that writes, syncs, renames or removes fails, as if the process died there."""
    calls = {"left": count}

    def wrap(function):  # type: ignore[no-untyped-def]
        def wrapped(*args, **kwargs):  # type: ignore[no-untyped-def]
            calls["left"] -= 1
            if calls["left"] == 0:
                raise Crash
            return function(*args, **kwargs)

        return wrapped

    for module, name in ((os, "fsync"), (os, "rename"), (shutil, "rmtree"), (checkpoint, "_write_synced")):
        monkeypatch.setattr(module, name, wrap(getattr(module, name)))


@pytest.mark.parametrize("count", range(1, 16))
def test_a_crash_between_any_two_operations_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(make(1))
    folder.save(make(2))
    with monkeypatch.context() as patched:
        crash_at(patched, count)
        try:
            folder.save(make(3))
        except Crash:
            crashed = True
        else:
            crashed = False
    loaded, warnings = CheckpointFolder(tmp_path, keep=1).load_newest()
    assert loaded is not None
    assert warnings == []
    assert loaded.step in (2, 3)
    assert same(loaded, make(loaded.step))
    if not crashed:
        assert loaded.step == 3
    folder.save(make(4))
    assert folder.steps()[-1] == 4


def test_every_count_of_operations_is_covered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(make(1))
    folder.save(make(2))
    crash_at(monkeypatch, 16)
    folder.save(make(3))  # a whole save makes fewer than 16 of the operations above


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_found_and_the_one_before_is_loaded(tmp_path: Path, name: str, damage: str) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(make(1))
    path = folder.save(make(2)) / name
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip" and name != "state.json":
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    loaded, warnings = folder.load_newest()
    assert loaded is not None
    assert loaded.step == 1
    assert len(warnings) == 1
    assert "step_00000002" in warnings[0]
    assert (tmp_path / "step_00000002.damaged").is_dir()


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    (folder.save(make(1)) / "state.json").unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is whole"):
        folder.load_newest()


def test_the_digest_is_over_float32_bytes_in_the_order_of_names() -> None:
    import hashlib

    weights = {"b": np.array([3.0]), "a": np.array([[1.0, 2.0]], np.float32), "c": np.array(4, np.int32)}
    optimizer = {"m": np.array([[5, 7], [6, 8]], np.float32).T}
    expected = [hashlib.sha256(np.arange(1, stop, dtype="<f4").tobytes()).hexdigest() for stop in (5, 9)]
    assert digests_of(weights, optimizer) == {"weights_sha256": expected[0], "state_sha256": expected[1]}


def test_files_are_safetensors_that_its_own_library_reads(tmp_path: Path) -> None:
    tensors = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "i": np.array(7, np.int32),
        "empty": np.zeros((0, 2)),
    }
    path = CheckpointFolder(tmp_path).save(Checkpoint(tensors, {}, {"step": 1}))
    found = safetensors.numpy.load_file(path / "weights.safetensors")
    assert {name: (value.dtype, value.shape) for name, value in found.items()} == {
        name: (value.dtype, value.shape) for name, value in tensors.items()
    }
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value)


def test_state_json_tells_the_sha256_of_each_file(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path).save(make(1))
    state = json.loads((path / "state.json").read_text())
    assert set(state["files"]) == {"weights.safetensors", "optimizer.safetensors"}

"""A disk that fills up or turns read-only under a run: one line, and nothing half under a good name."""

import contextlib
import os
import re
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tfdp.reporting.writer import MetricsWriter
from tfdp.system.exits import ConfigError, TrainingError, run_command
from tfdp.training import loop
from tfdp.training.checkpoint import Checkpoint, CheckpointFolder, SaveFailed
from tfdp.training.saver import AsyncSaver
from trainers import causal_lm
from trainers.causal_lm import Config


def make(step: int, size: int = 1000) -> Checkpoint:
    return Checkpoint({"a": np.zeros(size, np.float32)}, {"m": np.zeros(size, np.float32)}, {"step": step})


def wait_for_the_save() -> None:
    for thread in threading.enumerate():
        if thread.name == "save-checkpoint":
            thread.join()


@contextlib.contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writing beyond this fails in every file, as on a full disk; Python and TensorFlow ignore the signal for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True) if os.geteuid() == 0 else None
    if result is None or result.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


# --- Checkpoints -----------------------------------------------------------------------------------


def test_a_save_that_fails_tells_folder_sizes_and_the_last_good_step(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(make(1))
    with file_size_limit(3000), pytest.raises(SaveFailed) as caught:
        folder.save(make(2))
    assert re.fullmatch(
        rf"the checkpoint of step 2 cannot be saved in {tmp_path}: File too large; it needs 8,000 bytes, [\d,]+ are "
        r"free; the newest checkpoint is that of step 1",
        str(caught.value),
    )
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert folder.load(1).step == 1


def test_a_full_disk_keeps_the_checkpoints_that_are_there(small_disk: Path) -> None:
    folder = CheckpointFolder(small_disk / "checkpoints")
    folder.save(make(1, 20_000))
    with pytest.raises(SaveFailed, match=r"No space left on device; it needs 320,000 bytes, [\d,]+ are free"):
        folder.save(make(2, 40_000))
    assert (folder.steps(), folder.load(1).step) == ([1], 1)
    folder.save(make(3, 20_000))  # nothing of the failed one takes room
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(SaveFailed, match="Read-only file system"):
        folder.save(make(4, 10))
    assert folder.steps() == [1, 3]


def test_a_save_never_makes_a_run_directory_that_was_removed(tmp_path: Path) -> None:
    with pytest.raises(SaveFailed, match="No such file or directory"):
        CheckpointFolder(tmp_path / "run" / "checkpoints").save(make(1))
    assert list(tmp_path.iterdir()) == []


def test_a_save_beside_the_steps_that_fails_is_raised_between_two_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").write_text("no folder")
    with AsyncSaver(CheckpointFolder(tmp_path / "checkpoints")) as saver:
        saver.save(make(1))
        wait_for_the_save()
        with pytest.raises(SaveFailed, match="File exists"):
            saver.raise_failure()
        saver.raise_failure()  # once
    with pytest.raises(TrainingError), AsyncSaver(CheckpointFolder(tmp_path / "checkpoints")) as saver:
        saver.save(make(1))
        raise TrainingError("another reason")
    assert capsys.readouterr().err.startswith("warning: the checkpoint of step 1 cannot be saved in")


def test_a_run_whose_save_fails_ends_at_the_next_step_in_one_line(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(training={"steps": 1000, "log_every": 5}, checkpoint={"every_steps": 10})
    advance, limits = loop._advance, contextlib.ExitStack()
    steps = []

    def fill_the_disk(task: object, batches: object, progress: loop.Progress) -> object:
        steps.append(progress.step)
        if progress.step in (15, 20):
            wait_for_the_save()
        if progress.step == 15:
            limits.enter_context(file_size_limit(100))
        return advance(task, batches, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_advance", fill_the_disk)
    with limits:
        assert run_command(lambda: causal_lm.train(config) and None) == 1
    error = capsys.readouterr().err
    assert steps[-1] in (15, 20)  # of the step after the save at the latest
    assert re.search(r"^error: the checkpoint of step 20 cannot be saved .* that of step 10$", error, re.MULTILINE)
    assert "Traceback" not in error
    folder = Path(str(config.run_dir), "checkpoints")
    assert [path.name for path in folder.iterdir()] == ["step_00000010"]
    monkeypatch.undo()
    summary = causal_lm.train(replace(config, training=replace(config.training, steps=30)))
    assert summary["step"] == 30


# --- What tells of a run ---------------------------------------------------------------------------


def test_a_run_goes_on_without_tensorboard_and_rows_where_they_cannot_be_written(
    tiny_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = causal_lm.train(tiny_config("undisturbed"))
    config = tiny_config()
    run = Path(str(config.run_dir))
    (run / "tensorboard").mkdir(parents=True)
    for name in ("train", "validation"):
        (run / "tensorboard" / name).write_text("no folder")
    (run / "metrics.jsonl").symlink_to("/dev/full")
    capsys.readouterr()
    found = causal_lm.train(config)
    assert found["state_sha256"] == expected["state_sha256"]
    error = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in error] == ["warning"] * 3, error
    assert error[0].startswith("warning: TensorBoard's files are no longer written: ")
    assert error[1] == f"warning: {run}/metrics.jsonl cannot be written (No space left on device): its rows wait"
    assert error[2].startswith(f"warning: {run}/metrics.jsonl lacks the last ")


def test_a_disk_that_fills_up_under_tensorboard_is_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = MetricsWriter(tmp_path, resumed_step=0)
    writer.text("config", "seed: 0", 0)
    with file_size_limit(200):
        for step in range(1, 4):
            writer.validation(
                {"step": step, "validation_loss": 1.0, "evaluation_seconds": 1.0}, 3, {"loss": 1.0}, ["loss 1.0"]
            )
            writer.text("sample", "text" * 1000, step)
    writer.close()
    error = capsys.readouterr().err
    assert error.count("TensorBoard") == 1 and error.count("\n") == error.count("warning: ") == 3, error


def test_a_summary_that_cannot_be_written_is_one_line_and_is_written_later(
    tiny_config: Callable[..., Config],
) -> None:
    config = tiny_config(training={"steps": 2})
    run = Path(str(config.run_dir))
    (run / "summary.json").mkdir(parents=True)
    with pytest.raises((TrainingError, ConfigError), match="Is a directory"):
        causal_lm.train(config)
    (run / "summary.json").rmdir()
    assert causal_lm.train(config)["step"] == 2
    assert (run / "summary.json").is_file()

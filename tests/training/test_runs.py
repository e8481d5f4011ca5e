"""A run directory: who works in it, which configuration it has, and a record that stays as it is."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from workers import start, tiny_arguments

from tfdp.config.parsing import load_file, to_yaml
from tfdp.config.run_config import with_run_config
from tfdp.launch import name_run_directory
from tfdp.system.exits import ConfigError, TrainingError
from tfdp.training.run_directory import RunDirectory
from trainers import causal_lm
from trainers.causal_lm import Config

TIMEOUT = 240  # seconds for a process that loads TensorFlow, on a busy machine


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- One training at a time ------------------------------------------------------------------------


def test_a_second_training_in_a_run_directory_is_refused(tmp_path: Path) -> None:
    name = str(tmp_path / "run")
    with RunDirectory.holding(name) as run:
        run.begin("seed: 0\n")
        with (
            pytest.raises(ConfigError, match=rf"^run_dir \({name}\) must not be in use: pid {os.getpid()} on "),
            RunDirectory.holding(name),
        ):
            pass
        with RunDirectory.holding(name, is_chief=False) as other:  # another worker of the same job
            assert other == run
    with RunDirectory.holding(name):
        pass
    assert set(files_of(run.path)) == {"config.yaml", "metrics.jsonl"}


def test_a_directory_that_gets_no_files_is_removed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/b/run", None):
        with pytest.raises(ConfigError, match=r"^no$"), RunDirectory.holding(name):
            raise ConfigError("no")
        assert list(tmp_path.iterdir()) == []


def test_two_runs_that_begin_in_one_second_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunDirectory.holding(None) as one, RunDirectory.holding(None) as two, RunDirectory.holding(None) as three:
        assert len({one.path, two.path, three.path}) == 3


def test_a_run_directory_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for name, why in (("file", "File exists"), ("file/run", "Not a directory"), ("loop", ".*symbolic links")):
        with (
            pytest.raises(ConfigError, match=rf"^run_dir \(\S+{name}\) must be a folder that can be written: {why}$"),
            RunDirectory.holding(str(tmp_path / name)),
        ):
            pass


def test_a_directory_that_is_removed_or_replaced_ends_the_run(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tfdp.training import loop

    config = tiny_config()
    path = Path(str(config.run_dir))
    advance = loop._advance

    def replace_it(*arguments: object) -> object:
        path.rename(path.with_name("moved"))
        path.mkdir()
        (path / "another").touch()
        return advance(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_advance", replace_it)
    with pytest.raises(
        TrainingError, match=rf"^run_dir \({path}\) was removed or replaced while this run worked in it"
    ):
        causal_lm.train(config)
    assert {name for name in files_of(path) if not name.startswith("metrics")} == {"another"}


@pytest.mark.multiworker
def test_the_command_and_the_launcher_refuse_a_second_training_at_once(corpus_dir: Path, tmp_path: Path) -> None:
    arguments = tiny_arguments(corpus_dir, tmp_path / "run", training__steps=1_000_000, training__log_every=1000)
    with start(tmp_path, [arguments]) as job:
        job.wait_for("^first step", timeout=TIMEOUT)
        pid, files = job.processes[0].pid, set(files_of(tmp_path / "run"))
        expected = (
            rf"error: run_dir \({tmp_path}/run\) must not be in use: pid {pid} on \S+ trains there; wait for its end, "
            r"or name another run_dir"
        )
        for command in (
            ["-m", "tfdp.train", *arguments],
            [
                "-m",
                "tfdp.launch",
                "--num_workers",
                "2",
                "--grace_seconds",
                "1",
                "--max_restarts",
                "3",
                "--",
                *arguments,
            ],
        ):
            result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=TIMEOUT)
            told = [line for line in result.stderr.splitlines() if "error" in line]
            assert result.returncode == 2, result.stderr
            assert len(told) == 1 and re.fullmatch(rf"(\[worker 0\] )?{expected}", told[0]), result.stderr
        assert set(files_of(tmp_path / "run")) - files <= {"checkpoints/step_00000001/state.json"}
        job.processes[0].kill()  # what a launcher restarts at once is not refused
        job.processes[0].wait()
        with RunDirectory.holding(str(tmp_path / "run")):
            pass


# --- Its configuration -----------------------------------------------------------------------------


def test_the_config_of_a_run_begins_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Callable[..., Config]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(training={"steps": 1})
    causal_lm.train(replace(config, run_dir="runs/a"))
    text = Path("runs/a/config.yaml").read_text()
    assert "run_dir" not in text
    for folder, written in (("runs/a", text), ("runs/a", f"run_dir: runs/a\n{text}"), ("old", "run_dir: old\n")):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "config.yaml").write_text(written)  # as earlier versions wrote it
        argv = with_run_config(["--config", f"{folder}/config.yaml", "--seed", "9"])
        assert load_of(argv).run_dir is None
        assert load_of(argv).seed == 9
        argv = with_run_config(["--config", f"{folder}/config.yaml", "--run_dir", "runs/b"])
        assert load_of(argv).run_dir == "runs/b"
    Path("mine.yaml").write_text("run_dir: runs/c\nseed: 5\n")  # a user's own file may name one
    assert (load_of(with_run_config(["--config", "mine.yaml"])).run_dir) == "runs/c"
    argv = with_run_config(["--config", "mine.yaml", "--config", "runs/a/config.yaml"])
    assert (load_of(argv).run_dir, load_of(argv).training.steps) == ("runs/c", 1)


def load_of(argv: list[str]) -> Config:
    from tfdp.config.parsing import load

    return load(Config, argv, "train", "")


def test_a_link_is_followed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/config.yaml").write_text("seed: 7\n")
    Path("runs/latest").symlink_to("a")
    Path("mine").symlink_to("runs/latest")
    for name in ("runs/latest", "mine", "runs/latest/"):
        found = load_of(with_run_config(["--run_dir", name]))
        assert (found.run_dir, found.seed) == ("runs/a", 7)
        arguments, folder = name_run_directory(["--run_dir", name])
        assert (arguments[-2:], folder) == (["--run_dir", "runs/a"], Path("runs/a"))
        assert RunDirectory.open(name).path == Path("runs/a")
        with RunDirectory.holding(name) as run:
            assert run.path == Path("runs/a")


def test_a_config_that_the_user_put_there_stays_as_it_is(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(training={"steps": 2})
    run = Path(str(config.run_dir))
    run.mkdir()
    by_hand = "# mine\nseed:    3   # three\n"
    (run / "config.yaml").write_text(by_hand)
    causal_lm.train(config)
    assert (run / "config.yaml").read_text() == by_hand
    resolved = replace(config, run_dir=None)
    assert load_file(Config, run / "resolved.yaml") == resolved == load_file(Config, RunDirectory(run).config_path)

    argv = ["--run_dir", str(run)]
    assert load_of(with_run_config(argv)) == config  # what the run has, with the flags of its start
    (run / "config.yaml").write_text("# mine\nseed: 3\ncheckpoint: {keep: 7}\n")  # and what was changed by hand since
    assert load_of(with_run_config(argv)) == replace(config, checkpoint=replace(config.checkpoint, keep=7))
    causal_lm.train(replace(config, training=replace(config.training, steps=3)))
    assert (run / "config.yaml").read_text().startswith("# mine\n")
    (run / "config.yaml").unlink()
    assert load_of(with_run_config(argv)).training.steps == 3


def test_a_finished_run_named_again_keeps_its_record_byte_for_byte(
    tiny_config: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(training={"steps": 3})
    run = Path(str(config.run_dir))
    first = causal_lm.train(config)
    before, times = files_of(run), {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert any(name.startswith("seconds/") for name in first)
    capfd.readouterr()
    optimizer = replace(config.optimizer, learning_rate=0.001)
    again = causal_lm.train(replace(config, optimizer=optimizer))
    assert again == first
    assert files_of(run) == before
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == times
    out, error = capfd.readouterr()
    assert error == ""
    line = "finished   already: its record stays as it is; without effect: optimizer.learning_rate: 0.01 -> 0.001"
    assert line in out.splitlines() and f"summary      {run}/summary.json" in out

    (run / "summary.json").write_bytes((run / "summary.json").read_bytes().replace(b"0", b"1", 1))
    again = causal_lm.train(config)  # what is damaged is made again from the checkpoint
    for key in ("step", "state_sha256", "validation_loss", "best_validation_loss", "sequences_seen"):
        assert again[key] == first[key]
    assert RunDirectory(run).read_summary() == again


# --- Its history -----------------------------------------------------------------------------------


def test_the_history_tells_which_steps_ran_under_which_keys(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(training={"steps": 4}, checkpoint={"every_steps": 2, "keep": 9})
    causal_lm.train(config)
    run = Path(str(config.run_dir))
    changed = {"training": replace(config.training, steps=8), "optimizer": replace(config.optimizer, clip_norm=0.5)}
    config = replace(config, **changed, distribution=replace(config.distribution, num_replicas=2))
    summary = causal_lm.train(config)
    expected = {
        "training.steps": [4, 8],
        "optimizer.clip_norm": [1.0, 0.5],
        "distribution.num_replicas": [None, 2],
    }
    found = [(entry["from_step"], entry["changed"], entry["layout"]["num_replicas"]) for entry in summary["history"]]
    assert found == [(0, {}, 1), (4, expected, 2)]
    assert all(entry["version"] and entry["time"] for entry in summary["history"])
    assert RunDirectory(run).read_summary()["history"] == summary["history"]
    for step, length in ((2, 1), (4, 1), (6, 2), (8, 2)):
        state = json.loads((run / f"checkpoints/step_{step:08d}/state.json").read_text())
        assert len(state["history"]) == length
        assert state["config"] == to_yaml(replace(config, run_dir=None), without=["run_dir"]) or step <= 4


@pytest.mark.slow
def test_the_history_survives_a_kill(corpus_dir: Path, tmp_path: Path) -> None:
    def arguments(**changes: object) -> list[str]:
        steps = {"training__steps": 1_000_000, "checkpoint__every_steps": 20, "training__log_every": 20}
        return tiny_arguments(corpus_dir, tmp_path / "run", **steps, **changes)

    folder, reached = RunDirectory(tmp_path / "run").checkpoints(), 0
    for changes in ({}, {"optimizer__clip_norm": 0.5}):
        with start(tmp_path, [arguments(**changes)]) as job:
            job.wait_for("^first step", timeout=TIMEOUT)
            while max(folder.steps(), default=0) < reached + 40:
                time.sleep(0.05)
            job.processes[0].send_signal(signal.SIGKILL)
            job.wait()
        reached = folder.steps()[-1]
    history = folder.state(folder.steps()[-1])["history"]
    assert [entry["changed"] for entry in history] == [{}, {"optimizer.clip_norm": [1.0, 0.5]}]
    assert history[1]["from_step"] % 20 == 0 and history[1]["from_step"] >= 20

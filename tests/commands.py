"""Commands as processes of their own, for tests: with and without a TensorFlow that can be imported."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHORT = 30  # seconds for what must not load TensorFlow, on a busy machine
LONG = 120  # seconds for what must
LONG_RUN = 300  # seconds for a run of several replicas or workers, which share two busy cores


def run(folder: Path, *command: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs `python *command` in a folder of its own, with its cache there too."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )


def tfdp(folder: Path, command: str, *arguments: str, timeout: float = LONG) -> tuple[int, str, str]:
    """Runs `python -m tfdp.COMMAND`; returns its exit code and what it printed on both streams."""
    done = run(folder, "-m", f"tfdp.{command}", *arguments, timeout=timeout)
    return done.returncode, done.stdout, done.stderr


def train_in_layouts(folder: Path, prefix: str, keys: Sequence[str]) -> list[str]:
    """Trains on 1, 2 and 4 replicas and on 2 workers; returns the names of the runs, that of one replica first."""
    layouts = {
        "one": ("train", []),
        "two": ("train", ["--distribution.num_replicas=2"]),
        "four": ("train", ["--distribution.num_replicas=4"]),
        "workers": ("launch", ["--num_workers=2", "--"]),
    }
    for name, (command, own) in layouts.items():
        run_dir = f"--run_dir={prefix}_{name}"
        code, _, error = tfdp(folder, command, *own, run_dir, *keys, timeout=LONG_RUN)
        assert code == 0, error
    return [f"{prefix}_{name}" for name in layouts]


def losses(run_dir: Path) -> list[float]:
    """The training losses of a run, in order."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def summary(run_dir: Path) -> dict[str, Any]:
    """What summary.json of a run holds."""
    return dict(json.loads((run_dir / "summary.json").read_text()))


def without_tensorflow(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module` where importing TensorFlow or Keras fails."""
    program = (
        "import runpy, sys; sys.modules.update(tensorflow=None, keras=None); "
        "module, *sys.argv[1:] = sys.argv[1:]; runpy.run_module(module, run_name='__main__', alter_sys=True)"
    )
    return run(folder, "-c", program, module, *arguments, timeout=SHORT)


def assert_refused(result: subprocess.CompletedProcess[str], message: str) -> None:
    """Exit code 2, and nothing but one line that matches `message`."""
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert re.fullmatch(f"error: {message}", lines[0]), lines[0]
    assert result.returncode == 2


def kill_a_worker(launcher: "subprocess.Popen[str]", run_dir: Path, seconds: float = 200) -> str:
    """Kills the last worker of `tfdp.launch` once the run has a checkpoint; returns what the job wrote until its end.

    Raises:
      AssertionError: no worker was there to be killed, or the job failed.
    """
    try:
        deadline = time.monotonic() + seconds
        while not list((run_dir / "checkpoints").glob("step_*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        line = ["pgrep", "-P", str(launcher.pid), "-f", "tfdp.train"]
        workers = subprocess.run(line, capture_output=True, text=True).stdout.split()
        assert workers, "no worker was found while the job ran"
        os.kill(int(workers[-1]), signal.SIGKILL)
        out, error = launcher.communicate(timeout=seconds)
    except BaseException:
        os.killpg(launcher.pid, signal.SIGKILL)
        raise
    assert launcher.returncode == 0, error
    return out + error

"""Commands as processes of their own, for tests: with and without a TensorFlow that can be imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = 30  # seconds for what must not load TensorFlow, on a busy machine
LONG = 120  # seconds for what must


def run(folder: Path, *command: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs `python *command` in a folder of its own, with its cache there too."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )


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

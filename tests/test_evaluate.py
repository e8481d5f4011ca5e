"""`tfdp.evaluate` and `tfdp.generate`, as processes of their own, after a run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import assert_refused, without_tensorflow

pytestmark = pytest.mark.timeout(180)


def tfdp(folder: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TF_NUM_INTRAOP_THREADS"}
    command_line = [sys.executable, "-m", f"tfdp.{command}", "--run_dir", "run", *arguments]
    return subprocess.run(command_line, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose validation loss has other last digits where operations have more threads."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(Path(__file__).parents[1] / "tfdp", folder / "text", ignore=shutil.ignore_patterns("__pycache__"))
    arguments = ["--data.source", "text:text/*.py", "--data.validation_fraction", "0.3"]
    arguments += ["--model.num_layers", "1", "--training.steps", "5", "--training.sample_tokens", "0"]
    assert tfdp(folder, "train", *arguments).returncode == 0
    return folder


def test_evaluate_gives_the_validation_loss_of_the_run_to_the_bit(run: Path) -> None:
    summary = json.loads((run / "run" / "summary.json").read_text())
    result = tfdp(run, "evaluate")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    keys = ("validation_loss", "validation_bits_per_byte", "corpus_sha256")
    assert [found[key] for key in keys] == [summary[key] for key in keys]
    assert (found["step"], found["num_tokens"] > 1000) == (5, True)

    result = tfdp(run, "evaluate", "--distribution.num_replicas", "2", "--rows", "5")
    assert json.loads(result.stdout)["validation_loss"] == pytest.approx(summary["validation_loss"], rel=1e-6)


def test_generate_continues_a_prompt(run: Path) -> None:
    arguments = ("--prompt", "def ", "--num_tokens", "20", "--seed", "1")
    first, second = (tfdp(run, "generate", *arguments).stdout for _ in range(2))
    assert first.startswith("def ") and len(first) > len("def \n")
    assert first == second


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("evaluate", ["--checkpoint", "7"], r"checkpoint \(7\) must be best, newest, or one of the steps 5"),
        ("generate", ["--checkpoint", "first"], r"checkpoint \(first\) must be best, newest, or one of the steps 5"),
        ("replay", ["--step", "6"], r"step \(6\) must lie in \[1, 5\]: the run has 5"),
    ],
)
def test_a_state_that_the_run_does_not_have_is_refused_before_tensorflow_loads(
    run: Path, command: str, arguments: list[str], message: str
) -> None:
    assert_refused(without_tensorflow(run, f"tfdp.{command}", "--run_dir", "run", *arguments), message)


@pytest.mark.parametrize("command", ["evaluate", "replay"])
def test_another_text_is_refused_before_tensorflow_loads(run: Path, command: str) -> None:
    changed = run / "text" / "train.py"
    text = changed.read_text(encoding="utf-8")
    changed.write_text("changed = True\n", encoding="utf-8")
    try:
        result = without_tensorflow(run, f"tfdp.{command}", "--run_dir", "run")
        line = r"data\.source \(text:text/\*\.py\) must be the text that the run was trained on: .*"
        assert_refused(result, line)
    finally:
        changed.write_text(text, encoding="utf-8")

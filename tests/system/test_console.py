"""What becomes of a command whose stdout or stderr is closed, full, unread or ASCII."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOST = "note: stdout cannot be written ({}): continuing without it\n"
FULL = "error: output could not be written: No space left on device\n"

# What a shell does to the streams of `python -m ...`, which is "$@"
CONDITIONS = {
    "closed stdout": '"$@" >&-',
    "closed stderr": '"$@" 2>&-',
    "nothing open": '"$@" <&- >&- 2>&-',
    "full": '"$@" > /dev/full',
    "unread": '{ "$@"; echo $? > code; } | true; exit $(cat code)',
    "ascii": 'PYTHONIOENCODING=ascii "$@"',
    "C locale": 'LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 "$@"',
}


def run(folder: Path, condition: str, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs `python *command` in a folder, as a shell does under a condition."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    shell = ["bash", "-c", CONDITIONS[condition], "bash", sys.executable, *command]
    return subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


# A command that writes a file while it prints, and whose native part writes to the descriptors.
PROGRAM = """
import os, sys, time
from tfdp.system.exits import run_command
def main():
    file = open("written", "w")
    for number in range(2000):
        print(f"line {number} \\u00e9", flush=True)
    os.write(1, b"native\\n")
    os.write(2, b"")
    print("an error", file=sys.stderr)
    file.write("whole")
    file.close()
sys.exit(run_command(main, output_is_result=sys.argv[1] == "result"))
"""


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_command_goes_on_without_its_output(tmp_path: Path, condition: str) -> None:
    result = run(tmp_path, condition, "-c", PROGRAM, "record")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "written").read_text() == "whole"
    notes = {"full": LOST.format("No space left on device"), "unread": LOST.format("Broken pipe")}
    quiet = condition in ("closed stderr", "nothing open")
    assert result.stderr == ("" if quiet else notes.get(condition, "") + "an error\n")
    if condition in ("ascii", "C locale"):
        assert result.stdout.splitlines()[0] == r"line 0 \xe9"


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_result_that_cannot_be_written_is_an_error(tmp_path: Path, condition: str) -> None:
    result = run(tmp_path, condition, "-c", PROGRAM, "result")
    lost = condition in ("full", "unread")
    assert result.returncode == int(lost), result.stderr
    assert (tmp_path / "written").read_text() == ("" if lost else "whole")
    expected = {"full": FULL, "unread": "", "closed stderr": "", "nothing open": ""}
    assert result.stderr == expected.get(condition, "an error\n")


def test_output_that_is_lost_at_the_very_end_is_an_error_too(tmp_path: Path) -> None:
    program = (
        "import sys; from tfdp.system.exits import run_command; sys.exit(run_command(lambda: print('short'), True))"
    )
    result = run(tmp_path, "full", "-c", program)
    assert (result.returncode, result.stderr) == (1, FULL)


COMMANDS = ["train", "launch", "prepare", "evaluate", "generate", "chat", "replay", "plan", "benchmark"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("condition", ["nothing open", "full"])
def test_help_never_ends_in_a_traceback(tmp_path: Path, command: str, condition: str) -> None:
    result = run(tmp_path, condition, "-m", f"tfdp.{command}", "--help")
    is_result = command not in ("train", "launch", "prepare")
    assert result.returncode == int(is_result and condition in ("full", "unread"))
    assert len(result.stderr.splitlines()) <= 1
    assert "Traceback" not in result.stderr


SMALL = ["--model.num_layers=1", "--model.num_heads=2", "--model.model_dim=16", "--model.context_length=16"]
SMALL += ["--training.steps=2", "--training.sample_tokens=4", "--data.source=text:a.txt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a run that learned it."""
    folder = tmp_path_factory.mktemp("console")
    (folder / "a.txt").write_text("some words for a model to learn é. " * 400)
    return folder


def train(folder: Path, condition: str) -> None:
    name = condition.replace(" ", "_")
    result = run(folder, condition, "-m", "tfdp.train", *SMALL, "--run_dir", name, timeout=280)
    assert result.returncode == 0, result.stderr
    rows = (folder / name / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2 and all(row.startswith("{") for row in rows)
    assert (folder / name / "summary.json").is_file()
    assert "Traceback" not in result.stderr


@pytest.mark.timeout(300)
def test_a_training_whose_streams_are_closed_writes_its_record_alone(folder: Path) -> None:
    train(folder, "nothing open")


# The worst conditions in `make test-slow`, all of them by hand.
SOME = [
    pytest.param(each, marks=pytest.mark.slow if each in ("nothing open", "unread") else pytest.mark.full)
    for each in CONDITIONS
]


@pytest.mark.parametrize("condition", SOME)
def test_a_training_ends_with_its_own_code(folder: Path, condition: str) -> None:
    train(folder, condition)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("condition", SOME)
def test_no_command_ends_in_a_traceback(folder: Path, condition: str) -> None:
    if not (folder / "run" / "summary.json").exists():
        (folder / "run").mkdir(exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "tfdp.train", *SMALL, "--run_dir", "run"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")},
            check=True,
            timeout=280,
        )
    commands = {
        "launch": ["--num_workers=1", "--", *SMALL, "--run_dir", f"launched {condition}"],
        "prepare": ["--source=text:a.txt", "--tokenizer=bytes", "--output", f"shards {condition}"],
        "evaluate": ["--run_dir=run"],
        "generate": ["--run_dir=run", "--num_tokens=4", "--prompt=a"],
        "replay": ["--run_dir=run", "--step=1"],
        "plan": ["--device=H100", *SMALL],
    }
    for command, arguments in commands.items():
        result = run(folder, condition, "-m", f"tfdp.{command}", *arguments, timeout=200)
        is_result = command not in ("launch", "prepare")
        assert result.returncode == int(is_result and condition in ("full", "unread")), (command, result.stderr)
        assert "Traceback" not in result.stderr, command

"""The commands as their users meet them: exit codes, one line on stderr, and nothing left behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def left_behind(folder: Path) -> set[str]:
    """What a command made besides its cache."""
    return {path.name for path in folder.iterdir()} - {"cache"}


# --- What needs no TensorFlow, and does not load it ------------------------------------------------


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "replay"])
def test_help_answers_without_tensorflow(tmp_path: Path, command: str) -> None:
    result = without_tensorflow(tmp_path, f"tfdp.{command}", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: python -m tfdp.{command} [--config CONFIG]")
    assert " ".join(result.stdout.split()).count("default: ") >= 4
    assert left_behind(tmp_path) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.num_head", "2"],
            r"unknown key model\.num_head on the command line: did you mean model\.num_heads\?",
        ),
        (["--training.steps", "many"], r"training\.steps \(many\) must be a whole number"),
        (["--model.num_heads", "3"], r"model\.num_heads \(3\) must divide model\.model_dim \(128\): try 2"),
        (
            ["--training.global_batch_size", "30", "--training.microbatch_size", "8"],
            r"training\.global_batch_size \(30\) must be a multiple of training\.microbatch_size \(8\): try 32",
        ),
        (["--config", "none.yaml"], r"--config \(none\.yaml\) must be an existing YAML file"),
        (["--trainer", "none"], r"trainer \(none\) must name a module: trainers\.none does not exist; try causal_lm"),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_line_before_tensorflow_loads(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert_refused(without_tensorflow(tmp_path, "tfdp.train", "--run_dir", "run", *arguments), message)
    assert left_behind(tmp_path) == set()


LONG_NAME = "x" * 300
LONG_SHOWN = r"x{100}\.\.\.x+[a-z/.]*"


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("train", ["--run_dir", LONG_NAME], rf"run_dir \({LONG_SHOWN}\) must be a folder: File name too long"),
        ("train", ["--config", LONG_NAME], rf"--config \({LONG_SHOWN}\) must be readable: File name too long"),
        ("train", ["--run_dir", os.fsdecode(b"caf\xe9")], r"run_dir \(caf\\xe9\) must be text in UTF-8"),
        ("train", ["--run_dir="], r"run_dir \(\) must name a folder: try --run_dir runs/NAME"),
        (
            "train",
            ["--model.model_dim", str(2**63 - 1)],
            r"model\.model_dim \(9223372036854775807\) must be at most 1,048,576",
        ),
        ("train", ["--seed", "1", "--seed=2"], r"seed \(2\) must be given once: it is 1 before"),
        ("launch", ["--", "--run_dir", LONG_NAME], rf"run_dir \({LONG_SHOWN}\) must be a folder: File name too long"),
        ("prepare", ["--output="], r"output \(\) must name a folder: try --output shards"),
        ("prepare", ["--num_processes", "9999999"], r"num_processes \(9999999\) must be at most 1,024"),
        ("evaluate", ["--rows", "9" * 20], r"rows \(9{20}\) must be at most 16,777,216"),
        ("generate", ["--prompt", os.fsdecode(b"\xff")], r"prompt \(\\xff\) must be text in UTF-8"),
        ("replay", ["--step", "9" * 30], r"step \(9{30}\) must be at most 2,147,483,647"),
        ("plan", ["--num_workers", "1" + "0" * 20], r"num_workers \(10{20}\) must be at most 65,536"),
        ("plan", ["--model.num_layers", "1000000000"], r"model\.num_layers \(1000000000\) must be at most 10,000"),
        ("benchmark", ["--layouts", "²x1"], r"layouts \(²x1\) must list WORKERSxREPLICAS: try 1x1,2x1"),
        (
            "benchmark",
            ["--output", f"{LONG_NAME}/rows.json"],
            f"{LONG_SHOWN} is no name for a file: File name too long",
        ),
        ("systems", ["tfdp"], r"tfdp\.systems must be given SYSTEM SHAPE PRECISION NUM_REPLICAS: .*"),
    ],
)
def test_nonsense_is_refused_in_one_line_by_every_command(
    tmp_path: Path, module: str, arguments: list[str], message: str
) -> None:
    assert_refused(run(tmp_path, "-m", f"tfdp.{module}", *arguments, timeout=SHORT), message)
    assert left_behind(tmp_path) == set()


def test_no_argument_at_all_starts_the_default_job(tmp_path: Path) -> None:
    result = without_tensorflow(tmp_path, "tfdp.train")
    assert result.stderr.splitlines()[-1] == "ModuleNotFoundError: import of keras halted; None in sys.modules"


def test_print_config_prints_the_resolved_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 4\nmodel: {num_layers: 2}\n")
    result = without_tensorflow(tmp_path, "tfdp.train", "--seed", "5", "--config", "a.yaml", "--print_config")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\nseed: 5\n" in result.stdout and "\n  num_layers: 2\n" in result.stdout


def test_a_recipe_of_the_users_own_is_run(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.py").write_text(
        "from dataclasses import dataclass\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    trainer: str = 'mine.recipe'\n"
        "    size: int = 1\n\n\n"
        "def train(config):\n"
        "    print(f'size {config.size}')\n"
    )
    result = without_tensorflow(tmp_path, "tfdp.train", "--trainer", "mine.recipe", "--size", "3")
    assert (result.returncode, result.stdout, result.stderr) == (0, "size 3\n", "")


# --- What is found in the text or on the devices ---------------------------------------------------


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        pytest.param(b"", [], r"data\.source.*\btext:a\.txt\b.* must not be empty.*", id="empty corpus"),
        pytest.param(
            b"a short text\n" * 3,
            [],
            r"model\.context_length \(128\) must fit into the train split, which has \d+ tokens: .*",
            id="corpus shorter than a sequence",
        ),
        pytest.param(
            b"caf\xe9 " * 1000,
            [],
            r"data\.source.* a\.txt must be UTF-8: byte 3 is 0xe9 .*",
            id="not UTF-8",
        ),
        pytest.param(
            None,
            [],
            r"data\.source \(text:a\.txt\) must match at least one file: .*",
            id="missing file",
        ),
        pytest.param(
            b"text enough for a sequence\n" * 1000,
            ["--distribution.num_replicas", "2", "--training.global_batch_size", "3"],
            r"training\.global_batch_size \(3\) must be a multiple of num_replicas \(2\): try 4",
            id="batch that the replicas cannot share",
        ),
    ],
)
def test_a_wrong_corpus_or_layout_is_refused_in_one_line(
    tmp_path: Path, content: bytes | None, arguments: list[str], message: str
) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    before = left_behind(tmp_path)
    command = ["-m", "tfdp.train", "--data.source", "text:a.txt", "--run_dir", "run", *arguments]
    assert_refused(run(tmp_path, *command, timeout=LONG), message)
    assert left_behind(tmp_path) == before


def test_a_directory_that_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    result = run(tmp_path, "-m", "tfdp.generate", "--run_dir", "none", timeout=LONG)
    assert_refused(result, r"run_dir \(none\) must be the directory of a run: there is no none/config\.yaml")
    assert left_behind(tmp_path) == set()

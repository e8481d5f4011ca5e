"""The commands as their users meet them: exit codes, one line on stderr, and nothing left behind."""

import os
from pathlib import Path

import pytest
from commands import LONG, ROOT, SHORT, assert_refused, run, without_tensorflow

TEXT = b"text enough for a sequence\n" * 1000


def left_behind(folder: Path) -> set[str]:
    """What a command made besides its cache."""
    return {path.name for path in folder.iterdir()} - {"cache"}


# --- What needs no TensorFlow, and does not load it ------------------------------------------------


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "chat", "replay"])
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
        ("benchmarking", ["tfdp"], r"tfdp\.benchmarking must be given SYSTEM SHAPE VARIANT NUM_REPLICAS: .*"),
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


# --- What is found in the text, the cluster and the run directory ----------------------------------


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        pytest.param(b"", {}, r"data\.source.*\btext:a\.txt\b.* must not be empty.*", id="empty corpus"),
        pytest.param(
            b"a short text\n" * 3,
            {},
            r"model\.context_length \(128\) must fit into the train split, which has \d+ tokens: .*",
            id="corpus shorter than a sequence",
        ),
        pytest.param(b"caf\xe9 " * 999, {}, r"data\.source.* a\.txt must be UTF-8: byte 3 is 0xe9 .*", id="not UTF-8"),
        pytest.param(None, {}, r"data\.source \(text:a\.txt\) must match at least one file: .*", id="missing file"),
        pytest.param(
            None, {"data.source": "tokens:none"}, r"data\.source: tokens \(none\) must be .*", id="no token shards"
        ),
        pytest.param(TEXT, {"data.tokenizer": "gpt2:none"}, r"data\.tokenizer.*none.*", id="no such tokenizer"),
        pytest.param(TEXT, {"data.cache_dir": "a.txt"}, r"data\.cache_dir \(a\.txt.*", id="cache in a file"),
        pytest.param(TEXT, {"run_dir": "a.txt"}, r"run_dir \(a\.txt\) must be a folder.*", id="run in a file"),
    ],
)
def test_a_wrong_corpus_is_refused_in_one_line_before_tensorflow_loads(
    tmp_path: Path, content: bytes | None, keys: dict[str, str], message: str
) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    before = left_behind(tmp_path)
    arguments = [f"--{key}={value}" for key, value in {"data.source": "text:a.txt", "run_dir": "run", **keys}.items()]
    assert_refused(without_tensorflow(tmp_path, "tfdp.train", *arguments), message)
    assert left_behind(tmp_path) == before


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TF_CONFIG": "{"}, r"TF_CONFIG.*"),
        ({"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 3}}'}, r"TF_CONFIG.*"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, r"SLURM_.*"),
    ],
)
def test_a_wrong_cluster_is_refused_in_one_line_before_tensorflow_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert_refused(without_tensorflow(tmp_path, "tfdp.train", "--run_dir", "run"), message)
    assert left_behind(tmp_path) == set()


@pytest.mark.parametrize("command", ["evaluate", "generate", "chat", "replay"])
def test_a_directory_that_is_no_run_is_refused_in_one_line_before_tensorflow_loads(
    tmp_path: Path, command: str
) -> None:
    result = without_tensorflow(tmp_path, f"tfdp.{command}", "--run_dir", "none")
    assert_refused(result, r"run_dir \(none\) must be the directory of a run: there is no none/config\.yaml")
    assert left_behind(tmp_path) == set()


# --- What is found on the devices ------------------------------------------------------------------


def test_a_batch_that_the_replicas_cannot_share_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    layout = ["--distribution.num_replicas", "2", "--training.global_batch_size", "3"]
    command = ["-m", "tfdp.train", "--data.source", "text:a.txt", "--run_dir", "run", *layout]
    message = r"training\.global_batch_size \(3\) must be a multiple of num_replicas \(2\): try 4"
    assert_refused(run(tmp_path, *command, timeout=LONG), message)
    assert left_behind(tmp_path) == {"a.txt"}


def test_the_package_itself_lists_its_commands(tmp_path: Path) -> None:
    listed = without_tensorflow(tmp_path, "tfdp.__main__").stdout
    own = {path.stem for path in (ROOT / "tfdp").glob("*.py") if "run_command" in path.read_text(encoding="utf-8")}
    assert {line.split()[2].removeprefix("tfdp.") for line in listed.splitlines() if "-m tfdp." in line[:20]} == own

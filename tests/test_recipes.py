"""A recipe of the user's own with another model: what was trained is what is evaluated, sampled and replayed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tfdp.training.checkpoint import CheckpointFolder

ROOT = Path(__file__).parents[1]
TIMEOUT = 400  # seconds, on a busy machine

# A GPT that adds a trained vector to each embedding: one weight more, and other logits.
RECIPE = """
import tensorflow as tf
from dataclasses import dataclass
from tfdp.models.gpt import GPT
from trainers.causal_lm import Config, make_sequences, make_task, weight_shapes

class Shifted(GPT):
    def build(self, input_shape):
        super().build(input_shape)
        self.shift = self.add_weight(shape=(self.config.model_dim,), initializer="ones", name="shift")

    def _embed(self, tokens, positions):
        x = super()._embed(tokens, positions)
        return x + tf.cast(tf.convert_to_tensor(self.shift), x.dtype)

def make_model(config, vocab_size, fuse):
    return Shifted(config.model, vocab_size, config.seed, config.training.precision, config.training.remat, fuse)
"""
WITHOUT_MODEL = "from trainers.causal_lm import Config, train\n"
MINIMAL = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    steps: int = 1

def train(config):
    print("steps", config.steps)
"""
LACKING = "run_dir, data, optimizer, distribution, checkpoint"
NO_SECTIONS = """
from dataclasses import dataclass
from trainers.causal_lm import make_model, make_sequences, make_task, weight_shapes

@dataclass(frozen=True)
class Config:
    seed: int = 0
    model: int = 0
    training: int = 0
"""
ARGUMENTS = ["--model.num_layers", "1", "--model.model_dim", "16", "--model.num_heads", "2"]
ARGUMENTS += ["--model.context_length", "16", "--training.steps", "4", "--training.sample_tokens", "0"]
ARGUMENTS += ["--optimizer.schedule", "constant", "--optimizer.warmup_steps", "0"]  # so that half a run is a run
ARGUMENTS += ["--training.jit_compile", "false", "--training.log_every", "1", "--data.validation_fraction", "0.2"]


def tfdp(folder: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    return subprocess.run(
        [sys.executable, "-m", f"tfdp.{command}", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def write(folder: Path, **modules: str) -> None:
    (folder / "mine").mkdir(exist_ok=True)
    for name, text in modules.items():
        (folder / "mine" / f"{name}.py").write_text(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> Path:
    """Holds a run of the recipe mine.shifted."""
    folder = tmp_path_factory.mktemp("recipes")
    write(folder, shifted=RECIPE, unnamed=WITHOUT_MODEL)
    source = ("--data.source", f"text:{corpus_dir}/*.txt")
    result = tfdp(folder, "train", "--trainer", "mine.shifted", "--run_dir", "run", *source, *ARGUMENTS)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.timeout(TIMEOUT)
def test_the_model_of_a_recipe_is_the_one_that_is_evaluated(folder: Path) -> None:
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert "trainer: mine.shifted" in (folder / "run" / "config.yaml").read_text()
    assert "shift" in CheckpointFolder(folder / "run" / "checkpoints").load(4).weights, (
        "the recipe's own model is trained"
    )
    result = tfdp(folder, "evaluate", "--run_dir", "run")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["validation_loss"] == summary["validation_loss"]


@pytest.mark.timeout(TIMEOUT)
def test_the_model_of_a_recipe_is_the_one_that_is_replayed_and_sampled(folder: Path) -> None:
    assert "shift" in CheckpointFolder(folder / "run" / "checkpoints").load(4).weights
    result = tfdp(folder, "replay", "--run_dir", "run", "--step", "4", "--num_sequences", "0")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("equal") == 2
    result = tfdp(folder, "generate", "--run_dir", "run", "--num_tokens", "5")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.timeout(TIMEOUT)
def test_a_run_of_a_recipe_is_resumed(folder: Path, corpus_dir: Path) -> None:
    source = ("--data.source", f"text:{corpus_dir}/*.txt")
    at = ARGUMENTS.index("--training.steps") + 1
    first = ["--trainer", "mine.shifted", *source, *ARGUMENTS[:at], "2", *ARGUMENTS[at + 1 :]]
    for arguments in (first, ["--training.steps", "4"]):
        result = tfdp(folder, "train", "--run_dir", "halves", *arguments)
        assert result.returncode == 0, result.stderr
    halves, whole = (json.loads((folder / name / "summary.json").read_text()) for name in ("halves", "run"))
    assert [entry["from_step"] for entry in halves["history"]] == [0, 2]
    for key in ("weights_sha256", "state_sha256", "validation_loss"):
        assert halves[key] == whole[key], key


@pytest.mark.timeout(TIMEOUT)
def test_a_recipe_that_makes_no_model_is_refused_and_not_taken_for_another(folder: Path) -> None:
    config = folder / "run" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("mine.shifted", "mine.unnamed"))
    try:
        for command, function, purpose in (
            ("train", "make_model", "trained"),
            ("evaluate", "make_model", "evaluated"),
            ("generate", "make_model", "read back"),
            ("replay", "make_model", "replayed"),
        ):
            result = tfdp(folder, command, "--run_dir", "run")
            line = f"error: trainer (mine.unnamed) must be a recipe with a {function} function to be {purpose}\n"
            assert (result.returncode, result.stdout, result.stderr) == (2, "", line)
    finally:
        config.write_text(text)


def test_trainer_is_a_key_of_the_command_whatever_the_recipe(tmp_path: Path) -> None:
    write(tmp_path, minimal=MINIMAL)
    result = tfdp(tmp_path, "train", "--trainer", "mine.minimal", "--steps", "5")
    assert (result.returncode, result.stdout, result.stderr) == (0, "steps 5\n", "")
    result = tfdp(tmp_path, "train", "--trainer", "mine.minimal", "--print_config")
    assert (result.returncode, result.stdout) == (0, "steps: 1\ntrainer: mine.minimal\n")
    (tmp_path / "a.yaml").write_text(result.stdout)
    (tmp_path / "b.yaml").write_text("steps: 7\n")
    result = tfdp(tmp_path, "train", "--config", "a.yaml", "--config", "b.yaml")  # the second names no recipe
    assert (result.returncode, result.stdout, result.stderr) == (0, "steps 7\n", "")
    result = tfdp(tmp_path, "train", "--trainer", "mine.minimal", "--help")
    assert "The recipe, by the dotted path of its module." in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("name", "text", "code", "message"),
    [
        ("mine.none", "", 2, r"must name a module: mine.none does not exist; try causal_lm"),
        ("none.such", "", 2, r"must name a module: none.such does not exist; try causal_lm"),
        ("mine.bad", "def f(:\n", 1, r"cannot be imported: SyntaxError: invalid syntax ({}, line 1)"),
        ("mine.bad", "\nx = y\n", 1, r"cannot be imported: NameError: name 'y' is not defined ({}, line 2)"),
        ("mine.bad", "import mi\n", 1, r"cannot be imported: ModuleNotFoundError: No module named 'mi' ({}, line 1)"),
        ("mine.bad", "Config = train = 1\n", 2, r"must have a dataclass as its Config"),
        (
            "mine.bad",
            NO_SECTIONS,
            2,
            rf"must be a recipe whose Config has {LACKING}",
        ),
    ],
)
def test_a_recipe_that_cannot_be_imported_is_one_line(
    tmp_path: Path, name: str, text: str, code: int, message: str
) -> None:
    write(tmp_path, bad=text)
    result = tfdp(tmp_path, "train", "--trainer", name)
    assert result.stderr == f"error: trainer ({name}) {message.format(tmp_path / 'mine' / 'bad.py')}\n"
    assert (result.returncode, result.stdout) == (code, "")

"""A trained GPT, read back from its run directory: what evaluate and generate start from."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import tensorflow as tf

from tfdp import checkpoint
from tfdp.config import find_trainer, import_trainer, load_file
from tfdp.estimates import largest_matrix
from tfdp.exits import ConfigError
from tfdp.gpt import GPT
from tfdp.runs import RunDirectory
from tfdp.step import Compilation
from tfdp.tokenizer import Tokenizer, make_tokenizer, open_tokenizer


@dataclass(frozen=True)
class TrainedGPT:
    """A model with the weights of one checkpoint, and the configuration that it was trained with."""

    recipe: ModuleType
    config: Any
    tokenizer: Tokenizer
    model: GPT
    compilation: Compilation  # as in training: the same bits
    step: int
    corpus_sha256: str


def load_trained(run_dir: str, which: str) -> TrainedGPT:
    """Loads the model of a run; call it inside the scope of the strategy that will use it.

    Args:
      run_dir: the directory of a run.
      which: "best" (lowest validation loss), "newest", or a step.

    Raises:
      ConfigError: no such run or checkpoint, or a damaged one.
    """
    run = RunDirectory.open(run_dir)
    recipe = import_trainer(find_trainer(["--config", str(run.config_path)]))
    config = load_file(recipe.Config, run.config_path)
    saved = run.checkpoints().load(_choose_step(run, which))
    has_own = run.tokenizer_path.exists()  # a run from before there were others than bytes has none
    tokenizer = open_tokenizer(run.tokenizer_path) if has_own else make_tokenizer("bytes")
    training, on_gpu = config.training, bool(tf.config.list_physical_devices("GPU"))
    largest = largest_matrix(config.model, tokenizer.vocab_size)
    compilation = Compilation.choose(training.jit_compile, training.precision, on_gpu, largest)
    model = GPT(config.model, tokenizer.vocab_size, config.seed, training.precision, fuse=compilation.parts)
    checkpoint.restore(model.named_weights(), saved.weights)
    corpus_sha256 = saved.state["identity"]["corpus_sha256"]
    return TrainedGPT(recipe, config, tokenizer, model, compilation, saved.step, corpus_sha256)


def _choose_step(run: RunDirectory, which: str) -> int:
    folder = run.checkpoints()
    steps = folder.steps()
    if not steps:
        raise ConfigError(f"run_dir ({run.path}) must hold a checkpoint: there is none yet")
    if which == "newest":
        return steps[-1]
    if which == "best":
        return folder.best_step() or steps[-1]
    if not which.isdigit() or int(which) not in steps:
        listed = ", ".join(map(str, steps))
        raise ConfigError(f"checkpoint ({which}) must be best, newest, or one of the steps {listed}")
    return int(which)

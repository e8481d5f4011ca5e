"""A trained GPT, read back from its run directory: what evaluate and generate start from."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import tensorflow as tf

from tfdp.checkpoint import Tensors, restore
from tfdp.config import find_trainer, import_trainer, load_file
from tfdp.estimates import largest_matrix
from tfdp.exits import ConfigError
from tfdp.gpt import GPT
from tfdp.messages import shown
from tfdp.options import whole_number
from tfdp.runs import RunDirectory
from tfdp.step import Compilation
from tfdp.tokenizer import Tokenizer, make_tokenizer, open_tokenizer


@dataclass(frozen=True)
class TrainedGPT:
    """One checkpoint of a run, and what it was trained with; no device is touched before the model is made."""

    recipe: ModuleType
    config: Any
    tokenizer: Tokenizer
    compilation: Compilation  # as in training: the same bits
    weights: Tensors
    step: int
    corpus_sha256: str  # of the text that it was trained on

    @classmethod
    def open(cls, run_dir: str, which: str) -> "TrainedGPT":
        """Reads a checkpoint.

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
        corpus_sha256 = saved.state["identity"]["corpus_sha256"]
        return cls(recipe, config, tokenizer, compilation, saved.weights, saved.step, corpus_sha256)

    def make_model(self) -> GPT:
        """The model with its trained weights; call it inside the scope of the strategy that will use it."""
        config, vocab_size = self.config, self.tokenizer.vocab_size
        model = GPT(config.model, vocab_size, config.seed, config.training.precision, fuse=self.compilation.parts)
        restore(model.named_weights(), self.weights)
        return model


def _choose_step(run: RunDirectory, which: str) -> int:
    folder = run.checkpoints()
    steps = folder.steps()
    if not steps:
        raise ConfigError(f"run_dir ({run.path}) must hold a checkpoint: there is none yet")
    if which == "newest":
        return steps[-1]
    if which == "best":
        return folder.best_step() or steps[-1]
    step = whole_number(which)
    if step is None or step not in steps:
        listed = ", ".join(map(str, steps))
        raise ConfigError(f"checkpoint ({shown(which)}) must be best, newest, or one of the steps {shown(listed)}")
    return step

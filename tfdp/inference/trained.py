"""A trained model, read back from its run directory, for evaluate and generate."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tfdp.config.options import whole_number
from tfdp.config.parsing import to_yaml
from tfdp.config.run_config import differing_keys, flatten_yaml
from tfdp.config.sections import ModelConfig
from tfdp.data.examples import ExampleKeys, open_keys
from tfdp.data.inputs import path_of
from tfdp.data.tokenizers.tokenizer import Tokenizer, make_tokenizer, open_tokenizer
from tfdp.interop import hugging_face, origin
from tfdp.models.dimensions import largest_matrix
from tfdp.recipe import Model, Recipe, import_recipe, recipe_of_file
from tfdp.system.exits import ConfigError, require
from tfdp.system.messages import shown
from tfdp.training.run_directory import RunDirectory
from tfdp.training.weights import Tensors, restore

if TYPE_CHECKING:  # this module reads, and refuses, before TensorFlow is loaded
    from tfdp.training.compilation import Compilation


@dataclass(frozen=True)
class TrainedModel:
    """One checkpoint of a run, and what it was trained with; TensorFlow is not needed before the model is made."""

    recipe: Recipe
    config: Any
    tokenizer: Tokenizer
    weights: Mapping[str, np.ndarray]  # of a folder of another library: each is read when it is asked for
    frozen: Tensors
    step: int
    corpus_sha256: str  # of the text that it was trained on; empty where that is not known
    summary: Mapping[str, Any]  # of the run; {} where there is none
    model_type: str | None = None  # the architecture, where it comes from Hugging Face
    started_from: str | None = None  # the folder of its first weights
    tokenizer_name: str = "bytes"  # as `data.tokenizer` names it
    is_run: bool = True  # of tfdp, not a folder of another library
    example_keys: Sequence[ExampleKeys] = ()  # how records became its examples; empty where nothing says

    @classmethod
    def open(
        cls, run_dir: str, which: str, purpose: str, functions: Sequence[str] = ("make_model", "weight_shapes")
    ) -> "TrainedModel":
        """Reads a checkpoint.

        Args:
          run_dir: the directory of a run, or a folder of Hugging Face.
          which: "best" (by validation loss, or the metric of its task), "newest", or a step.
          purpose: what for, such as "evaluated".
          functions: that the recipe of the run must have for it.

        Raises:
          ConfigError: no such run or checkpoint, a damaged one, or one that the other files of the run do not fit.
        """
        if origin.is_foreign(Path(run_dir)):
            rule = "must be best for a folder of another library, which has one model"
            require(which in ("best", "newest"), "checkpoint", which, rule)
            return cls._of_folder(run_dir)
        run = RunDirectory.open(run_dir)
        recipe, config = recipe_of_file(run.config_path, functions, purpose)
        saved = run.checkpoints().load(_choose_step(run, which))
        refuse_other_keys(run, config, list(run.checkpoints().states()[0].values())[-1])
        tokenizer = open_own_tokenizer(run, saved.state)
        corpus_sha256 = saved.state["identity"]["corpus_sha256"]
        summary, model_type = run.read_summary(), None
        if (started_from := getattr(config.model, "init_from", None)) is not None:
            model_type = hugging_face.model_type_of(path_of(origin.base_of(started_from)))
            config = origin.without_origin(config)
        sets = (saved.evaluated, saved.frozen, saved.step)
        name = f"bpe:{run.tokenizer_path}" if run.tokenizer_path.exists() else "bytes"  # of whatever kind
        keys = ExampleKeys.of(config.data)
        ways = [keys] if keys.makes_examples else open_keys(run.examples_path, "run_dir")
        made = cls(recipe, config, tokenizer, *sets, corpus_sha256, summary, model_type, started_from, name)
        return replace(made, example_keys=ways)

    @classmethod
    def _of_folder(cls, name: str) -> "TrainedModel":
        """The model of a folder of another library."""
        found = origin.open_origin(name, "run_dir")
        recipe = import_recipe("causal_lm")
        config = recipe.Config(model=ModelConfig(**{**found.keys, "init_from": name}))
        tokenizer = make_tokenizer(found.tokenizer, "run_dir")
        weights = found.weights(config.model, tokenizer.vocab_size)
        return cls(recipe, config, tokenizer, weights, {}, 0, "", {}, found.model_type, name, found.tokenizer, False)

    @property
    def compilation(self) -> "Compilation":
        """As in training: the same bits."""
        from tfdp.parallel import distribution
        from tfdp.training.compilation import Compilation

        training, on_gpu = self.config.training, distribution.num_gpus() > 0
        largest = largest_matrix(self.recipe.weight_shapes(self.config, self.tokenizer.vocab_size))
        return Compilation.choose(training.jit_compile, training.precision, on_gpu, largest)

    def make_model(self) -> Model:
        """The model with its trained weights; call it inside the scope of the strategy that will use it."""
        model = self.recipe.make_model(self.config, self.tokenizer.vocab_size, self.compilation.kernels)
        if getattr(self.config.model, "init_from", None) is None:  # else the model was made with them
            restore(model.named_weights(), self.weights)
        if self.frozen:
            restore(model.named_frozen_weights(), self.frozen)
        return model


def refuse_other_keys(run: RunDirectory, config: Any, state: Mapping[str, Any]) -> None:
    """Compares the configuration of a run with that of its newest checkpoint, and warns where it is another.

    Raises:
      ConfigError: it is that of another model or run.
    """
    own_yaml = to_yaml(config)
    own = flatten_yaml(own_yaml)
    identity = {
        key: value for key, value in state.get("identity", {}).items() if key in own and key != "data.tokenizer"
    }
    changed = differing_keys(state.get("config", own_yaml), own_yaml)
    changed |= {key: (value, own[key]) for key, value in identity.items() if value != own[key]}
    listed = "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in changed.items())
    if changed.keys() & identity.keys():
        raise ConfigError(f"run_dir ({run.path}) holds a {run.config_path.name} that is not the run's: {listed}")
    if changed:
        line = f"warning: {run.config_path} is not that of the newest checkpoint: {listed}"
        print(line, file=sys.stderr, flush=True)


def open_own_tokenizer(run: RunDirectory, state: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a run directory. Raises `ConfigError` where it is not that of the checkpoint."""
    has_own = run.tokenizer_path.exists()  # a run from before there were others than bytes has none
    tokenizer = open_tokenizer(run.tokenizer_path) if has_own else make_tokenizer("bytes")
    fingerprint = tokenizer.fingerprint
    trained_with = state["identity"].get("data.tokenizer", fingerprint)
    if fingerprint != trained_with:
        raise ConfigError(
            f"tokenizer ({run.tokenizer_path}) must be that of the run: its fingerprint was {trained_with}, and is "
            f"{fingerprint} now"
        )
    return tokenizer


def _choose_step(run: RunDirectory, which: str) -> int:
    folder = run.checkpoints()
    steps = folder.steps()
    if not steps:
        raise ConfigError(f"run_dir ({run.path}) must hold a checkpoint: there is none yet")
    if which == "newest":
        return steps[-1]
    if which == "best":
        for line in folder.states()[1]:
            print(f"warning: {line}: it is not among those of which the best is chosen", file=sys.stderr, flush=True)
        return folder.best_or_newest_step() or steps[-1]
    step = whole_number(which)
    if step is None or step not in steps:
        listed = ", ".join(map(str, steps))
        raise ConfigError(f"checkpoint ({shown(which)}) must be best, newest, or one of the steps {shown(listed)}")
    return step

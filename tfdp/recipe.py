"""The contract of a recipe: what a module must define to be run by `--trainer`, checked when it is imported.

A recipe says what is trained on what; the step, the loop, the layouts and the files are the library's
(`tfdp/assembly.py`). The commands that train, or read a run back, use the recipe that the run names, and only these
names of it:

    Config                                  the keys: a dataclass with run_dir, seed and the sections `SECTIONS`
    make_model(config, vocab_size, fuse)    the model with its initial weights, a `Model`
    make_task(config, corpus)               what is learned, a `tasks.task.Task`
    make_sequences(config, split)           the rows that the tokens of a split are cut into
    weight_shapes(config, vocab_size)       of the model before it is made, for estimates

Its Config may also say `identity_keys`, keys of its own that a run cannot change on the way, `next_step`, what its
model is for (`RunDirectory.next_steps`), `learns_examples`, that its rows are no plain text (`tfdp.plan`), and
`prompt_attentions`, the values of `model.prompt_attention` that it trains with.

Or, instead of the functions, `train(config)`: a program of its own, whose runs no other command can read.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from tfdp.config import parsing
from tfdp.config.options import values_of
from tfdp.config.strict_yaml import read as read_yaml
from tfdp.system.exits import CommandError, ConfigError, require
from tfdp.system.messages import what_and_where
from tfdp.system.startup import importing

if TYPE_CHECKING:
    import keras

    from tfdp.data.sequences import Sequences
    from tfdp.data.shards import Split
    from tfdp.data.sources import Corpus
    from tfdp.tasks.task import Task

SECTIONS = ("model", "data", "optimizer", "training", "distribution", "checkpoint")  # of model, context_length at least
FUNCTIONS = ("make_model", "make_task", "make_sequences", "weight_shapes")


class Recipe(Protocol):
    """A module that can be trained, resumed, evaluated, sampled and replayed."""

    __name__: str
    __file__: str | None
    Config: type[Any]

    def make_model(self, config: Any, vocab_size: int, fuse: bool) -> "Model":
        """The model with its initial weights; called inside the scope of the strategy that will use it.

        Args:
          config: of the run.
          vocab_size: of the tokenizer.
          fuse: whether XLA compiles what lies between the matrix products: `Compilation.kernels`.
        """
        ...

    def make_task(self, config: Any, corpus: "Corpus") -> "Task":
        """What is learned from the rows, and the metrics of it."""
        ...

    def make_sequences(self, config: Any, split: "Split") -> "Sequences":
        """The rows that the tokens of a split are cut into; of all splits of a run, rows of one width."""
        ...

    def weight_shapes(self, config: Any, vocab_size: int) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the weights by name, before the model is made: for estimates and for choices by size."""
        ...


class Model(Protocol):
    """The model of a recipe: `gpt.GPT`, or a user's own.

    Attributes:
      trainable_variables: in the order of their gradients.
      output_table, features: for the loss, see `tasks.task.LanguageModel`.
      config, empty_cache, extend: for sampling, see `sampling.CachedModel`.
    """

    trainable_variables: Sequence[Any]
    output_table: Any
    features: Any
    config: Any
    empty_cache: Any
    extend: Any

    def named_weights(self) -> Mapping[str, "keras.Variable"]:
        """The trainable weights by name."""
        ...

    def named_frozen_weights(self) -> Mapping[str, "keras.Variable"]:
        """All other weights by name."""
        ...

    def num_params(self) -> int:
        """Number of trainable numbers."""
        ...

    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward for one token of a full row, as MFU counts them."""
        ...

    def describe(self) -> str:
        """The shape, for people."""
        ...


def load_recipe(
    argv: Sequence[str],
    prog: str,
    description: str,
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda values: values,
) -> tuple[Recipe, Any]:
    """The recipe that the arguments of a command name, and its configuration; see `parsing.load`."""
    trainer = find_trainer(argv)
    recipe = import_recipe(trainer)
    return recipe, parsing.load(config_class(recipe, trainer), argv, prog, description, complete)


def recipe_of_file(path: Path, wanted: Sequence[str], purpose: str) -> tuple[Recipe, Any]:
    """The recipe that a YAML file names, and its configuration.

    Raises:
      ConfigError: the recipe lacks one of the wanted functions, to be, say, "evaluated".
    """
    trainer = find_trainer(["--config", str(path)])
    recipe = import_recipe(trainer)
    require_functions(recipe, trainer, wanted, purpose)
    return recipe, parsing.load_file(config_class(recipe, trainer), path)


def find_trainer(argv: Sequence[str], default: str = "causal_lm") -> str:
    """The value of `--trainer` or of the YAML's `trainer` key, before anything else is read."""
    in_files = (read_yaml(Path(path)).get("trainer") for path in values_of("--config", argv))
    named = values_of("--trainer", argv) or [str(name) for name in in_files if name is not None]
    return named[-1] if named else default


def import_recipe(name: str) -> Recipe:
    """Imports a recipe: `causal_lm` means `trainers.causal_lm`; a dotted path is used as it is.

    Raises:
      ConfigError: the name is wrong, or what it names is no recipe.
      CommandError: the module is there, and its import fails.
    """
    path = name if "." in name else f"trainers.{name}"
    try:
        if path.startswith("."):
            raise ModuleNotFoundError(name=path)
        if path not in sys.modules:
            with importing():
                importlib.import_module(path)
        module = sys.modules[path]
    except Exception as error:  # whatever the module of a user raises
        if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
            raise ConfigError(f"trainer ({name}) must name a module: {path} does not exist; try causal_lm") from None
        raise CommandError(f"trainer ({name}) cannot be imported: {what_and_where(error)}") from error
    require(hasattr(module, "Config"), "trainer", name, "must be a module that defines Config")
    require(dataclasses.is_dataclass(module.Config), "trainer", name, "must have a dataclass as its Config")
    missing = [name for name in FUNCTIONS if not callable(getattr(module, name, None))]
    require(
        not missing or callable(getattr(module, "train", None)),
        "trainer",
        name,
        f"must be a recipe, but it does not define {', '.join(missing)}; or a program with a train(config) of its own",
    )
    if not missing:
        fields = {field.name for field in dataclasses.fields(module.Config)}
        lacking = [key for key in ("run_dir", "seed", *SECTIONS) if key not in fields]
        require(not lacking, "trainer", name, f"must be a recipe whose Config has {', '.join(lacking)}")
    return cast(Recipe, module)


def require_functions(recipe: Recipe, name: str, wanted: Sequence[str], purpose: str) -> None:
    """Raises `ConfigError` that names the first function that a recipe lacks to be, say, "evaluated"."""
    for function in wanted:
        rule = f"must be a recipe with a {function} function to be {purpose}"
        require(hasattr(recipe, function), "trainer", name, rule)


def config_class(recipe: Recipe, trainer: str) -> type[Any]:
    """The recipe's Config. Where it has no key `trainer` it gets one: the commands have it, whatever the recipe."""
    own: type[Any] = recipe.Config
    if any(field.name == "trainer" for field in dataclasses.fields(own)):
        return own
    made = dataclasses.make_dataclass(
        own.__name__,
        [("trainer", str, dataclasses.field(default=trainer, kw_only=True))],
        bases=(own,),
        frozen=own.__dataclass_params__.frozen,
    )
    made.__doc__ = f"{own.__doc__ or 'The run.'}\n\nArgs:\n    trainer: The recipe, by the dotted path of its module."
    return made

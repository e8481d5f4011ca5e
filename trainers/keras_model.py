"""A Keras model of your own, trained on next tokens: `--trainer keras_model --model.builder my_module:build`.

The builder is a function that returns a `keras.Model` from token ids (batch, time) to logits (batch, time, vocab_size),
or a backbone or causal language model of KerasHub. It is called inside the scope of the strategy, with `vocab_size` and
`context_length` where it asks for them. Step, reduction, data, resume and evaluation are those of `causal_lm`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tfdp import assembly
from tfdp.config.sections import KerasModelConfig
from tfdp.recipe import import_recipe
from tfdp.system.exits import require
from trainers import causal_lm
from trainers.causal_lm import make_sequences, make_task

if TYPE_CHECKING:
    from tfdp.models.wrapped import WrappedModel

__all__ = ["Config", "make_model", "make_sequences", "make_task", "train", "weight_shapes"]


@dataclass(frozen=True)
class Config(causal_lm.Config):
    """The run."""

    trainer: str = "keras_model"
    """The recipe: a module of trainers/, or the dotted path of your own."""
    model: KerasModelConfig = KerasModelConfig()  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        key, rule = "data.document_attention", "must be false: a Keras model attends to all that is before"
        require(not self.data.document_attention, key, self.data.document_attention, rule)
        size, rule = self.training.loss_chunk_size, "must be null: a Keras model gives all its logits at once"
        require(size is None, "training.loss_chunk_size", size, rule)
        rule = "must be cut_start, cut_end, skip or refuse: all of a text is learned"
        require(self.data.too_long != "cut_input", "data.too_long", self.data.too_long, rule)
        rule = "must be false: a Keras model keeps its activations"
        require(not self.training.remat, "training.remat", self.training.remat, rule)


def train(config: Config) -> dict[str, Any]:
    """Trains the model of the builder; returns what summary.json holds."""
    builder = config.model.builder
    require(bool(builder), "model.builder", builder, "must be given: try my_package.my_module:build")
    return assembly.train(import_recipe(config.trainer), config)


def make_model(config: Config, vocab_size: int, fuse: bool) -> "WrappedModel":
    """What the builder returns, with its initial weights."""
    from tfdp.models.wrapped import WrappedModel, build

    model = build(config.model, vocab_size, config.seed, config.training.precision)
    return WrappedModel(model, config.model, vocab_size)


def weight_shapes(config: Config, vocab_size: int) -> Mapping[str, tuple[int, ...]]:
    """None: they are known once the builder was called."""
    return {}

"""Classification: `--trainer classification --data.source jsonl:F --data.input_field text --data.label_field label`.

A text belongs to one of the classes `labels`. Checkpoints are compared by macro F1. `python -m tfdp.predict` writes the
classes of other texts, with their probabilities.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from tfdp import assembly
from tfdp.config.sections import DataConfig, TrainingConfig
from tfdp.data.sequences import Sequences, examples_of
from tfdp.data.sources import require_examples, require_whole_examples
from tfdp.recipe import import_recipe
from tfdp.system.exits import require
from trainers import causal_lm

if TYPE_CHECKING:
    from tfdp.data.shards import Split
    from tfdp.data.sources import Corpus
    from tfdp.models.gpt import GPT
    from tfdp.tasks.classification import Classification

__all__ = ["Config", "make_model", "make_sequences", "make_task", "train", "weight_shapes"]


@dataclass(frozen=True)
class Config(causal_lm.Config):
    """The run."""

    learns_examples: ClassVar[bool] = True
    identity_keys: ClassVar[tuple[str, ...]] = ("labels", "head")
    next_step: ClassVar[tuple[str, str]] = ("classes", "tfdp.predict --run_dir {} --input texts.jsonl")
    trainer: str = "classification"
    """The recipe: a module of trainers/, or the dotted path of your own."""
    data: DataConfig = DataConfig(sequences="whole", document_attention=True)
    # A batch has few targets, so its loss leaps: only what is not finite is a spike.
    training: TrainingConfig = TrainingConfig(sample_tokens=0, spike_threshold=None)
    labels: tuple[str, ...] = ()
    """The classes by name, in the order of the confusion matrix."""
    head: Literal["tokens", "linear"] = "tokens"
    """Where the scores of classes come from. tokens: those of the first token of each name, which a model that knows
    the words has learned already; linear: a table of their own, which starts at zero."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: the loss of an example is multiplied by (examples / classes / examples of its class)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        data = self.data
        require_whole_examples(data)
        rule = "must be cut_input, cut_start, skip or refuse: the label stands at the end"
        require(data.too_long != "cut_end", "data.too_long", data.too_long, rule)
        require(len(set(self.labels)) == len(self.labels), "labels", list(self.labels), "must not name a class twice")
        rule = 'must end with "{label}": nothing stands behind the class'
        is_last = data.template == "auto" or data.template.endswith("{label}")
        require(is_last, "data.template", data.template, rule)


def train(config: Config) -> dict[str, Any]:
    """Trains on the texts and classes that the configuration names; returns what summary.json holds."""
    require_examples(config.data)
    require(len(config.labels) > 1, "labels", list(config.labels), "must name two classes at least: try [ham, spam]")
    return assembly.train(import_recipe(config.trainer), config)


def make_model(config: Config, vocab_size: int, fuse: bool) -> "GPT":
    """A GPT, whose scores of classes are those of tokens or of a table of their own."""
    from tfdp.interop.origin import given_weights
    from tfdp.models.classifier import Classifier

    if config.head == "tokens":
        return causal_lm.make_model(config, vocab_size, fuse)
    training, given = config.training, given_weights(config.model, vocab_size)
    options = {"seed": config.seed, "precision": training.precision, "remat": training.remat, "fuse": fuse}
    return Classifier(len(config.labels), config.model, vocab_size, given=given, **options)


def make_task(config: Config, corpus: "Corpus") -> "Classification":
    """The class of each example. Raises `ConfigError` where one is of no class that is named."""
    from tfdp.data.labels import count_labels, label_ids
    from tfdp.tasks.classification import Classification

    ids = label_ids(config.labels, corpus.tokenizer)
    rule = "must differ in their first tokens with head tokens: rename them, or try --head linear"
    are_distinct = config.head == "linear" or len({each[0] for each in ids}) == len(ids)
    require(are_distinct, "labels", list(config.labels), rule)
    counts = np.sum([count_labels(split, config.labels, ids) for split in corpus.train], axis=0)
    for split in corpus.validation:
        count_labels(split, config.labels, ids)
    weights = None
    if config.class_weights == "balanced":
        require(bool((counts > 0).all()), "labels", list(config.labels), "must all occur in the training split")
        weights = tuple((counts.sum() / len(ids) / counts).tolist())
    return Classification(config.labels, ids, config.head, weights)


def make_sequences(config: Config, split: "Split") -> Sequences:
    """Rows of whole examples."""
    from tfdp.data.labels import label_room

    data, room = config.data, label_room(config.labels)
    return examples_of(split, config.model.context_length, data.sequences, data.too_long, room)


def weight_shapes(config: Config, vocab_size: int) -> Mapping[str, tuple[int, ...]]:
    """Those of the GPT, and of the table of classes."""
    shapes = dict(causal_lm.weight_shapes(config, vocab_size))
    if config.head == "linear":
        shapes["class_embedding"] = (len(config.labels), config.model.model_dim)
    return shapes

"""The contract of a task, and how its losses are summed.

Sums add up over any split of the rows, means do not; so a task gives sums, which are divided once all are there.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from tfdp.ops.cross_entropy import cross_entropy, projected_cross_entropy
from tfdp.ops.hashing import sequence_keys
from tfdp.ops.sums import fixed_sum
from tfdp.ops.visibility import CAUSAL, AttentionKind

# As the pipeline gives them. "tokens": int32 (rows, width); "position": int64 (rows,); "source": int32 (rows,)
Rows = Mapping[str, tf.Tensor]
Sums = tuple[tf.Tensor, tf.Tensor]  # sums of losses in nats, numbers of valid targets
LossFunction = Callable[[Rows, tf.Tensor], Sums]  # (rows of one micro-batch, step) -> sums


class Batch(NamedTuple):
    """What a model learns from some rows. A target can be excluded while its input stays."""

    inputs: tf.Tensor  # int32 (rows, time), token ids
    targets: tf.Tensor  # int32 (rows, time), token ids; negative where nothing is to be predicted
    attention: AttentionKind = CAUSAL
    weights: tf.Tensor | None = None  # float32 (rows, time), of the losses in training; None: 1. Their mean should be 1


class Metric(NamedTuple):
    """A metric of some rows."""

    value: float
    text: str  # with its name and unit, for people; empty: it is not printed
    is_recorded: bool = True  # in rows and summaries; what follows from other metrics is only shown


class Output(NamedTuple):
    """What a model wrote for an example, as texts."""

    prompt: str
    reference: str  # what it should be
    hypothesis: str  # what it is
    has_ended: bool = True  # or it was as long as it may be


Exhibit = str | np.ndarray  # a text in Markdown; or a picture, uint8 (height, width, 3)


class Task(Protocol):
    """What is learned from rows, and the metrics of it.

    A task whose metrics need more than losses has `num_statistics`, and `statistics(rows, features, table)`: so many
    sums for each row, float32 (rows, num_statistics), which an evaluation adds up.
    One that compares texts has `decoding`, a `DecodingConfig`: an evaluation writes outputs for examples. One with more
    to show than numbers has `exhibits(totals)`: by name texts in Markdown, or pictures, uint8 (height, width, 3). What
    has to stand beside its metrics in a summary, such as how they were computed, is `facts`, texts by name.

    Attributes:
      best: the metric by which the checkpoints of a run are compared.
      best_is_lowest: whether a lower one is better.
    """

    best: ClassVar[str]
    best_is_lowest: ClassVar[bool]

    def batch(self, rows: Rows) -> Batch:
        """The inputs and targets of some rows."""
        ...

    def metrics(self, totals: Mapping[str, Any]) -> Mapping[str, Metric]:
        """The metrics of some rows by name, in the order in which they are printed.

        Args:
          totals: over the rows. "loss": of all targets, in nats; "targets": their number, which may be 0; "bytes": of
            the text of the rows, whether it is a target or not. In an evaluation also "statistics": an array, and
            "outputs": a list of `Output`.
        """
        ...


def num_statistics(task: Task) -> int:
    """Of a task: 0 where losses are all that its metrics need."""
    return int(getattr(task, "num_statistics", 0))


def facts_of(task: Task) -> Mapping[str, str]:
    """What has to stand beside the metrics of a task."""
    found: Mapping[str, str] = getattr(task, "facts", {})
    return found


def exhibits(task: Task, totals: Mapping[str, Any]) -> Mapping[str, Exhibit]:
    """What a task shows of an evaluation beside its metrics."""
    shows = getattr(task, "exhibits", None)
    found: Mapping[str, Exhibit] = shows(totals) if shows is not None else {}
    return found


def named_metrics(task: Task, totals: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics of a task, each a float of Python, as JSON and comparisons want them."""
    return {name: metric._replace(value=float(metric.value)) for name, metric in task.metrics(totals).items()}


class LanguageModel(Protocol):
    """A model to score: `gpt.GPT`, or any other that ends in one projection to a vocabulary, or in logits."""

    output_table: Any  # (vocab_size, dim); None where the features are logits already

    def features(
        self, tokens: tf.Tensor, dropout_keys: tf.Tensor | None = None, attention: AttentionKind = CAUSAL
    ) -> tf.Tensor:
        """(rows, time, dim), which the rows of the table are multiplied with; or logits."""
        ...


def row_losses(
    task: Task,
    model: LanguageModel,
    dropout_seed: int | None = None,
    chunk_size: int | None = None,
    fuse: bool = False,
) -> LossFunction:
    """The losses and the valid targets of each row, as a function of (rows, step).

    Args:
      task: what is predicted.
      model: to features of tokens.
      dropout_seed: of the masks; None drops nothing, for evaluation.
      chunk_size, fuse: as in `projected_cross_entropy`.
    """

    def loss_function(rows: Rows, step: tf.Tensor) -> Sums:
        batch = task.batch(rows)
        keys = None if dropout_seed is None else sequence_keys(dropout_seed, step, rows["position"])
        features = model.features(batch.inputs, keys, batch.attention)
        weights = None if dropout_seed is None else batch.weights
        return _sums(batch, features, model.output_table, weights, chunk_size, fuse)

    return loss_function


def evaluation_sums(
    task: Task, model: LanguageModel, num_sources: int = 1, chunk_size: int | None = None, fuse: bool = False
) -> Callable[[Rows], tf.Tensor]:
    """What an evaluation adds up, by source: losses, valid targets, and what else the task counts.

    Returns:
      A function of rows to float32 (2 + num_statistics, num_sources).
    """

    def sums(rows: Rows) -> tf.Tensor:
        batch = task.batch(rows)
        features = model.features(batch.inputs, None, batch.attention)
        of_rows = _sums(batch, features, model.output_table, None, chunk_size, fuse)
        found = source_losses(lambda _rows, _step: of_rows, num_sources)(rows, tf.constant(0, tf.int64))
        parts = [tf.reshape(each, [1, num_sources]) for each in found]
        if num_statistics(task):
            counted = task.statistics(rows, features, model.output_table)  # type: ignore[attr-defined]
            own = tf.one_hot(rows["source"], num_sources) if num_sources > 1 else tf.ones([counted.shape[0], 1])
            parts.append(tf.matmul(counted, own, transpose_a=True))
        return tf.concat(parts, axis=0)

    return sums


def _sums(
    batch: Batch, features: tf.Tensor, table: Any, weights: tf.Tensor | None, chunk_size: int | None, fuse: bool
) -> Sums:
    """Losses and valid targets of each row."""
    if table is None:
        losses = cross_entropy(features, batch.targets)
        losses = losses if weights is None else losses * weights
    else:
        losses = projected_cross_entropy(features, table, batch.targets, chunk_size, fuse, weights)
    valid = tf.cast(batch.targets >= 0, tf.float32)
    return tf.reduce_sum(tf.cast(losses, tf.float64), axis=1), tf.reduce_sum(valid, axis=1)


def source_losses(losses_of_rows: LossFunction, num_sources: int = 1) -> LossFunction:
    """The same, summed over the rows of each source, (num_sources,): what a step and an evaluation add up."""

    def loss_function(rows: Rows, step: tf.Tensor) -> Sums:
        loss_sums, counts = losses_of_rows(rows, step)
        if num_sources == 1:
            sums = fixed_sum(loss_sums)[tf.newaxis]
            return tf.cast(sums, tf.float32), tf.reduce_sum(counts, keepdims=True)
        own = [rows["source"] == source for source in range(num_sources)]
        sums = tf.stack([fixed_sum(tf.where(mask, loss_sums, 0.0)) for mask in own])
        return tf.cast(sums, tf.float32), tf.stack([tf.reduce_sum(tf.where(mask, counts, 0.0)) for mask in own])

    return loss_function

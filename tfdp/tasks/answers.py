"""Learning from examples: a model sees a whole example, and predicts what is learned of it, such as an answer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow as tf

from tfdp.ops.visibility import ByDocument
from tfdp.tasks.causal_lm import perplexity
from tfdp.tasks.flags import ID_MASK, STARTS, UNSCORED
from tfdp.tasks.task import Batch, Metric, Rows


class ExampleRows(NamedTuple):
    """Rows of examples, as inputs and next-token targets: (rows, time) each."""

    inputs: tf.Tensor  # int32, token ids
    labels: tf.Tensor  # int32, the token after each input; negative where there is none
    is_learned: tf.Tensor  # bool, whether that token is to be predicted
    starts: tf.Tensor  # bool, the end of text before an example
    is_prompt: tf.Tensor  # bool, whether an input stands before all that is learned of its example


def read_examples(tokens: tf.Tensor) -> ExampleRows:
    """Takes rows with flags apart: int32 (rows, time + 1), see `tfdp/tasks/flags.py`."""
    is_there = tokens >= 0
    ids = tf.where(is_there, tf.bitwise.bitwise_and(tokens, ID_MASK), tokens)
    is_learned = is_there & (tf.bitwise.bitwise_and(tokens, UNSCORED) == 0)
    starts = is_there & (tf.bitwise.bitwise_and(tokens, STARTS) != 0)
    is_prompt = is_there & (_learned_since_start(is_learned, starts) == 0)
    return ExampleRows(tf.maximum(ids[:, :-1], 0), ids[:, 1:], is_learned[:, 1:], starts[:, :-1], is_prompt[:, :-1])


def _learned_since_start(is_learned: tf.Tensor, starts: tf.Tensor) -> tf.Tensor:
    """Tokens that are learned of an example, up to each one; the end of text before it is none: int32 (rows, time)."""
    total = tf.cumsum(tf.cast(is_learned, tf.int32), axis=1)
    time = total.shape[1]
    past = np.tril(np.ones((time, time), bool))
    before = tf.reduce_max(tf.where(past & starts[:, tf.newaxis, :], total[:, tf.newaxis, :], 0), axis=2)
    return total - before


@dataclass(frozen=True)
class Answers:
    """Next-token prediction of answers alone; the examples of a row do not see each other.

    Attributes:
      with_prompts: whether prompts are learned as well.
    """

    best: ClassVar[str] = "loss"
    best_is_lowest: ClassVar[bool] = True
    with_prompts: bool = False

    def batch(self, rows: Rows) -> Batch:
        examples = read_examples(rows["tokens"])
        targets = examples.labels if self.with_prompts else tf.where(examples.is_learned, examples.labels, -1)
        return Batch(examples.inputs, targets, ByDocument(examples.starts))

    def metrics(self, totals: Mapping[str, float]) -> dict[str, Metric]:
        loss = totals["loss"] / totals["targets"] if totals["targets"] else math.nan
        return {
            "loss": Metric(loss, f"loss {loss:.4f}"),
            "perplexity": Metric(perplexity(loss), f"perplexity {perplexity(loss):.2f}", is_recorded=False),
        }

"""A pass over a whole split: each token once, whatever the number of replicas."""

import math
from dataclasses import dataclass

import tensorflow as tf

from tfdp import data
from tfdp.shards import Split
from tfdp.step import EvalStep, LossFunction


@dataclass(frozen=True)
class Evaluation:
    """What a pass found."""

    loss: float  # nats per token
    bits_per_byte: float
    num_tokens: int


class Evaluator:
    """Evaluates a split, as often as it is called.

    Args:
      strategy: that the model was made under.
      loss_function: sums and counts over rows, without dropout.
      split: the text.
      context_length: tokens per sequence.
      rows: sequences per forward pass, over all replicas.
      jit_compile: whether XLA compiles the forward pass.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        loss_function: LossFunction,
        split: Split,
        context_length: int,
        rows: int,
        jit_compile: bool,
    ) -> None:
        self._step = EvalStep(strategy, loss_function, jit_compile)
        self._strategy, self._split = strategy, split
        self._context_length, self._rows = context_length, rows

    def __call__(self) -> Evaluation:
        batches, num_batches = data.validation_batches(self._strategy, self._split, self._context_length, self._rows)
        loss_sum, num_tokens = self._step(iter(batches), num_batches)
        return Evaluation(loss_sum / num_tokens, loss_sum / math.log(2) / self._split.num_bytes, num_tokens)

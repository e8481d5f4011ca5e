"""A pass over a whole split: each token once, whatever the number of replicas."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from tfdp import data
from tfdp.sequences import Sequences
from tfdp.step import EvalStep, LossFunction


@dataclass(frozen=True)
class Held:
    """The validation text of one source."""

    name: str
    sequences: Sequences
    num_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """What a pass found."""

    loss: float  # nats per token
    bits_per_byte: float
    num_tokens: int
    sources: dict[str, "Evaluation"]  # each source by its name, where there are several


class Evaluator:
    """Evaluates validation text, as often as it is called.

    Args:
      strategy: that the model was made under.
      loss_function: sums and counts over rows, by source, without dropout.
      held: the text.
      rows: sequences per forward pass on each replica.
      jit_compile: whether XLA compiles the forward pass.
      num_side_by_side: forward passes that a replica computes at the same time.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        loss_function: LossFunction,
        held: Sequence[Held],
        rows: int,
        jit_compile: bool,
        num_side_by_side: int = 1,
    ) -> None:
        self._step = EvalStep(strategy, loss_function, jit_compile, len(held), rows)
        self._strategy, self._held = strategy, held
        self._rows = rows * num_side_by_side * int(strategy.num_replicas_in_sync)

    def __call__(self) -> Evaluation:
        sequences = [each.sequences for each in self._held]
        batches, num_batches = data.validation_batches(self._strategy, sequences, self._rows)
        sums, counts = self._step(iter(batches), num_batches)
        sizes = np.array([each.num_bytes for each in self._held])
        parts = zip(self._held, sums, counts, sizes, strict=True)
        sources = {each.name: _evaluation(*numbers) for each, *numbers in parts} if len(self._held) > 1 else {}
        return _evaluation(sums.sum(), counts.sum(), sizes.sum(), sources)


def _evaluation(
    loss_sum: float, count: int, num_bytes: int, sources: dict[str, Evaluation] | None = None
) -> Evaluation:
    loss_sum = float(loss_sum)
    return Evaluation(loss_sum / int(count), loss_sum / math.log(2) / int(num_bytes), int(count), sources or {})

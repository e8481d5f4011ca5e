"""How replicas stay one model: what happens to gradients before an update, and to weights after it.

A train step leaves both to its synchronizer, and asks it what all replicas must hold alike, and when. `AllReduce` sums
all gradients over all replicas in every step. A way that synchronises less often is another class; the step, the loop
and the sentinel stay as they are.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import tensorflow as tf

from tfdp.parallel import collectives
from tfdp.parallel.buckets import Buckets


class Synchronizer(Protocol):
    """What a train step asks. `reduce` and `after_step` are called in replica context, inside the graph of a step.

    Attributes:
      shared: the variables, of the weights and the optimizer's state, that all replicas hold alike whenever they agree.
      num_reductions: in a step, as the transport sends them.
    """

    shared: Sequence[Any]
    num_reductions: int

    def reduction_bytes(self, num_statistics: int) -> int:
        """Bytes that each replica hands over in a step with so many numbers of statistics."""
        ...

    def reduce(self, gradients: Sequence[tf.Tensor], statistics: tf.Tensor) -> tuple[Sequence[tf.Tensor], tf.Tensor]:
        """The gradients to update with, and the statistics of the step that all replicas must know, a float32 vector.

        Both are sums over a replica's micro-batches, and become sums over the replicas that this one updates with.
        """
        ...

    def after_step(self, step: tf.Tensor, written: tf.Tensor) -> tf.Tensor:
        """What becomes of the weights after the update of a step.

        Args:
          step: int64 scalar, the number of updates before this one.
          written: a scalar that depends on the written update.

        Returns:
          A scalar that depends on the weights that the next step will use.
        """
        ...

    def agree_before(self, step: Any) -> Any:
        """Whether all replicas hold `shared` alike before a step: of an int or an int64 scalar, a bool of its kind."""
        ...


class AllReduce:
    """One sum over all replicas in every step; so all of them hold the same weights and state before each.

    Args:
      strategy: that the weights were made under.
      weights: trainable, in the order of their gradients.
      state: whatever else all replicas hold alike: of the optimizer, and the frozen weights.
      reduction: fast or canonical, the order of the sums.
      wire_dtype: float32 or bfloat16, in which gradients travel; statistics always travel in float32.
      bytes_per_pack: of a reduction; None: what suits the devices.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        weights: Sequence[Any],
        state: Sequence[Any],
        reduction: str = "fast",
        wire_dtype: str = "float32",
        bytes_per_pack: int | None = None,
    ) -> None:
        if bytes_per_pack is None:
            bytes_per_pack = collectives.default_bytes_per_pack(strategy)
        shapes = [tuple(weight.shape) for weight in weights]
        self.shared: Sequence[Any] = [*weights, *state]
        self._reduction, self._dtype = reduction, tf.as_dtype(wire_dtype)
        self._buckets = Buckets(shapes, bytes_per_pack, self._dtype.size)
        self._reduces = int(strategy.num_replicas_in_sync) > 1
        self._gradient_bytes = sum(math.prod(shape) for shape in shapes) * self._dtype.size
        self.num_reductions = collectives.num_reductions(strategy, self._buckets.num_packs) * self._reduces

    def reduction_bytes(self, num_statistics: int) -> int:
        return (self._gradient_bytes + 4 * num_statistics) * self._reduces

    def reduce(self, gradients: Sequence[tf.Tensor], statistics: tf.Tensor) -> tuple[Sequence[tf.Tensor], tf.Tensor]:
        if not self._reduces:
            return gradients, statistics  # as they are: laying them into packs would copy them twice
        packs = self._buckets.pack([tf.cast(gradient, self._dtype) for gradient in gradients])
        packs, statistics = collectives.sum_step(packs, statistics, self._reduction)
        return self._buckets.unpack(packs), statistics

    def after_step(self, step: tf.Tensor, written: tf.Tensor) -> tf.Tensor:
        return written  # the same update of the same weights: they are the same again

    def agree_before(self, step: Any) -> Any:
        return True

"""The average of the weights in the place of the weights, while a run evaluates and samples."""

import contextlib
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

from tfdp.training.update import assign_in_replica


class Averaging:
    """Exchanges weights and averages while a block runs, on each replica its own copies.

    What a replica holds stays its own, so a copy that disagrees with the others still does afterwards, and is found.

    Args:
      strategy: that the variables were made under.
      weights, averages: in the same order; none of either where a run has no average, and nothing happens.

    Attributes:
      is_on: whether the variables of the weights hold the averages.
    """

    is_on = False

    def __init__(
        self, strategy: tf.distribute.Strategy, weights: Sequence[keras.Variable], averages: Sequence[keras.Variable]
    ) -> None:
        self._pairs = list(zip(weights, averages, strict=True))
        self._exchange = tf.function(lambda: strategy.run(self._exchange_own), autograph=False)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Evaluates, samples, but saves nothing: a checkpoint holds the weights in their own place.

        Signals wait for a step, and an error ends the block with the weights back in place.
        """
        if not self._pairs:
            yield
            return
        assert not self.is_on, "the weights are exchanged already"
        self.is_on = True
        self._exchange()
        try:
            yield
        finally:
            self._exchange()
            self.is_on = False

    def _exchange_own(self) -> None:
        values = [(tf.identity(weight.value), tf.identity(average.value)) for weight, average in self._pairs]
        for (weight, average), (of_weight, of_average) in zip(self._pairs, values, strict=True):
            assign_in_replica(weight, of_average)
            assign_in_replica(average, of_weight)

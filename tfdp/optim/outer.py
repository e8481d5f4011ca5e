"""The outer optimizer: what becomes of the weights that all islands started a round from.

Its gradient is the weighted mean of what the islands have changed, with the sign turned. `average` takes the change as
it is, so the new weights are the mean of the islands' (McMahan et al. 2017, "Communication-Efficient Learning of Deep
Networks from Decentralized Data"; Stich 2019). `nesterov` gives it to SGD with Nesterov momentum, in PyTorch's form, in
which the momentum is not scaled by 1 - mu (Douillard et al. 2023, "DiLoCo", with a rate of 0.7 and a momentum of 0.9).
"""

from collections.abc import Sequence

import keras
import tensorflow as tf

from tfdp.config.sections import DistributionConfig


class OuterOptimizer:
    """An update rule and its state; make it inside `strategy.scope()`.

    Args:
      config: the rule and its constants.
      weights: of the model.

    Attributes:
      momentum: float32, one for each weight; none with `average`.
    """

    def __init__(self, config: DistributionConfig, weights: Sequence[keras.Variable]) -> None:
        self._rate, self._decay = config.outer_learning_rate, config.outer_momentum
        self.momentum: list[keras.Variable] = []
        if config.outer_optimizer == "nesterov":
            self.momentum = [
                keras.Variable(
                    lambda shape, dtype: tf.zeros(shape, dtype),
                    shape=weight.shape,
                    dtype="float32",
                    trainable=False,
                    name=f"outer_momentum_of_{weight.path.replace('/', '_')}",
                )
                for weight in weights
            ]

    def named_state(self) -> dict[str, keras.Variable]:
        """The momentum by name; the number in front keeps names apart and in order."""
        return {f"outer/{index:05d}/{variable.path}": variable for index, variable in enumerate(self.momentum)}

    def values(
        self, weights: Sequence[tf.Tensor], momentum: Sequence[tf.Tensor], changes: Sequence[tf.Tensor]
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """The new weights and the new momentum, without side effects.

        Args:
          weights: that the islands started from.
          momentum: of the rounds before.
          changes: of the weights, the mean over the islands.
        """
        if not self.momentum:
            return [weight + change for weight, change in zip(weights, changes, strict=True)], []
        moved = [self._decay * old + change for old, change in zip(momentum, changes, strict=True)]
        steps = [change + self._decay * new for change, new in zip(changes, moved, strict=True)]
        return [weight + self._rate * step for weight, step in zip(weights, steps, strict=True)], moved

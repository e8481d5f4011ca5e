"""An exponential moving average of the weights over the steps (Polyak and Juditsky 1992): often the better model.

It starts from the initial weights, and forgets them: after t steps the decay is at most (1 + t) / (10 + t), as in
`tf.train.ExponentialMovingAverage` with `num_updates`. With the decay alone, the average of a run of a few hundred
steps would be little more than its random beginning.
"""

from collections.abc import Mapping, Sequence

import keras
import tensorflow as tf

from tfdp.system.exits import require


class WeightAverage:
    """The averages of a list of weights; make it inside `strategy.scope()`.

    Args:
      decay: in [0, 1), the part of an average that a step keeps.
      weights: the trainable variables.

    Attributes:
      variables: the averages, float32, in the order of the weights.

    Raises:
      ConfigError: a weight is of another type than float32.
    """

    def __init__(self, decay: float, weights: Sequence[keras.Variable]) -> None:
        self._decay, self._weights = decay, list(weights)
        others = [f"{weight.path} is {weight.dtype}" for weight in weights if weight.dtype != "float32"]
        rule = f"needs a model whose weights are float32, but {others[0] if others else ''}: leave it out"
        require(not others, "training.ema_decay", decay, rule)
        self.variables = [
            keras.Variable(weight.numpy(), dtype="float32", trainable=False, name=_name(weight)) for weight in weights
        ]

    def named(self, weights: Mapping[str, keras.Variable]) -> dict[str, keras.Variable]:
        """The averages by the names of their weights."""
        found = {id(weight): average for weight, average in zip(self._weights, self.variables, strict=True)}
        return {name: found[id(weight)] for name, weight in weights.items()}

    def update(
        self, weights: Sequence[keras.Variable], averages: Sequence[keras.Variable], step: tf.Tensor
    ) -> list[tf.Tensor]:
        """The averages of some weights after their update, without side effects.

        Args:
          weights: which hold their new values.
          averages: theirs.
          step: int64 scalar, the number of updates before this one.
        """
        done = tf.cast(step + 1, tf.float32)
        decay = tf.minimum(tf.constant(self._decay, tf.float32), (1.0 + done) / (10.0 + done))
        found = []
        for weight, average in zip(weights, averages, strict=True):
            now = tf.convert_to_tensor(weight.value)
            found.append(now + decay * (tf.convert_to_tensor(average.value) - now))
        return found


def _name(weight: keras.Variable) -> str:
    return f"average_of_{weight.path.replace('/', '_')}"

"""Initial weights: functions of the seed and of the weight's name, or weights that exist."""

import math
import zlib
from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfdp.config.sections import ModelConfig
from tfdp.system.exits import ConfigError


class Initializers:
    """Initial weights that depend on the seed and the weight's name, not on the order of creation.

    Args:
      given: weights by their path in the model, to start from instead; read one by one, when each variable is made.
    """

    def __init__(self, config: ModelConfig, seed: int, given: Mapping[str, np.ndarray] | None = None) -> None:
        self._config, self._seed, self._given = config, seed, given
        self.are_given = given is not None

    def normal(self, name: str, scale: float = 1.0) -> keras.initializers.Initializer:
        if self._given is not None:
            return _Given(self._given, _path_of(name))
        seed = zlib.crc32(f"{self._seed}/{name}".encode()) & 0x7FFFFFFF
        return keras.initializers.RandomNormal(stddev=self._config.init_stddev * scale, seed=seed)

    def residual(self, name: str) -> keras.initializers.Initializer:
        """For the projections that write into the residual stream: zero, or scaled down by depth as in GPT-2."""
        if self._config.zero_init and self._given is None:
            return keras.initializers.Zeros()
        return self.normal(name, 1 / math.sqrt(2 * self._config.num_layers))

    def adapter(self, path: str, default: keras.initializers.Initializer) -> keras.initializers.Initializer:
        """For an adapter, which need not be among the given weights."""
        return _Given(self._given, path) if self._given is not None and path in self._given else default

    def uniform(self, name: str, bound: float) -> keras.initializers.Initializer:
        """Evenly spread between -bound and bound."""
        seed = zlib.crc32(f"{self._seed}/{name}".encode()) & 0x7FFFFFFF
        return keras.initializers.RandomUniform(-bound, bound, seed=seed)


class _Given(keras.initializers.Initializer):
    """A weight that exists."""

    def __init__(self, weights: Mapping[str, np.ndarray], path: str) -> None:
        self._weights, self._path = weights, path

    def __call__(self, shape: Sequence[int], dtype: str | None = None) -> tf.Tensor:
        weight = self._weights[self._path]
        if tuple(weight.shape) != tuple(shape):
            sizes = f"{list(weight.shape)} instead of {list(shape)}"
            raise ConfigError(f"the weights must have the shapes of the model: {self._path} has {sizes}")
        return tf.convert_to_tensor(np.ascontiguousarray(weight), dtype or "float32")


def _path_of(name: str) -> str:
    """The path of the weight that an initializer is named after."""
    if name == "embedding":
        return "token_embedding"
    if name.endswith("_embedding"):
        return name
    return f"{name.removesuffix('/output')}/output_projection/kernel" if name.endswith("/output") else f"{name}/kernel"

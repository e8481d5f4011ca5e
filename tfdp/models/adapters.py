"""Low-rank adapters as Keras layers; what they are stands in `lora.py`."""

import keras
import tensorflow as tf

from tfdp.config.sections import ModelConfig
from tfdp.models import lora
from tfdp.models.dropout import KeyedDropout
from tfdp.models.initializers import Initializers


class Adapter(keras.layers.Layer):
    """What is added to the output of a matrix product: s (x A) B for each share that has an adapter, else nothing.

    Args:
      layer: the product, and which of its shares have an adapter.
      path: of that product in the model; its adapters are named, and start, by it.
    """

    def __init__(
        self, config: ModelConfig, layer: lora.AdaptedLayer, initializers: Initializers, path: str, dtype: object
    ) -> None:
        super().__init__(name=lora.FOLDER, dtype=dtype)
        self._shares, self._initializers, self._place = layer, initializers, f"{path}/{lora.FOLDER}"
        self._rank, self._scale = config.lora_rank, lora.scale(config)
        self.dropout = KeyedDropout(config.lora_dropout, self._place, name="dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        num_inputs = self._shares.num_inputs
        self.a, self.b = [], []
        for target in self._shares.targets:
            path = f"{self._place}/{target}"
            start = self._initializers.adapter(f"{path}_a", self._initializers.uniform(path, num_inputs**-0.5))
            self.a.append(self.add_weight(shape=(num_inputs, self._rank), initializer=start, name=f"{target}_a"))
            start = self._initializers.adapter(f"{path}_b", keras.initializers.Zeros())
            shape = (self._rank, self._shares.widths[target])
            self.b.append(self.add_weight(shape=shape, initializer=start, name=f"{target}_b"))

    def call(self, x: tf.Tensor, dropout_keys: tf.Tensor | None = None) -> tf.Tensor:
        """(batch, time, num_inputs) -> (batch * time, outputs)."""
        flat = tf.reshape(self.dropout(x, dropout_keys), [-1, self._shares.num_inputs])
        joint = tf.concat([tf.convert_to_tensor(a) for a in self.a], axis=1)  # one product for all shares
        narrow = tf.split(tf.matmul(flat, joint) * self._scale, len(self.a), axis=1)
        outputs = {
            target: tf.matmul(each, tf.convert_to_tensor(b))
            for target, each, b in zip(self._shares.targets, narrow, self.b, strict=True)
        }
        num_tokens = tf.shape(flat)[0]
        shares = (
            outputs[share] if share in outputs else tf.zeros([num_tokens, width], flat.dtype)
            for share, width in self._shares.widths.items()
        )
        return tf.concat(list(shares), axis=1)


def make_adapter(config: ModelConfig, initializers: Initializers, path: str, dtype: object) -> Adapter | None:
    """The adapter of a layer of a block, by its path, such as "block_0/mlp/expand"; None where it has none."""
    layer = lora.adapted_layers(config).get(path.partition("/")[2])
    return None if layer is None else Adapter(config, layer, initializers, path, dtype)

"""Random masks that depend on what is computed, never on where.

A mask is a pure function of (seed, step, layer, global sequence index, element), so it is the same on any
replica, under any accumulation and after any resume, with XLA and without. Keras's own dropout draws from a
stateful generator that every replica copies: all replicas would drop the same elements.

The function is a counter-based hash on uint32, built from the lowbias32 finaliser of Chris Wellons's
hash-prospector (public domain): integer arithmetic only, hence equal on every device and compiler.
"""

import zlib

import keras
import tensorflow as tf

from tfdp.ops.hashing import mix, uint32


class KeyedDropout(keras.layers.Layer):
    """Drops activations of (batch, time, dim) by a mask of each sequence's own key.

    Args:
      rate: fraction dropped, in [0, 1); the rest is divided by 1 - rate.
      layer: a name unique within the model, mixed into the keys.
    """

    def __init__(self, rate: float, layer: str, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.rate = rate
        self.layer_key = zlib.crc32(layer.encode())

    def call(self, x: tf.Tensor, keys: tf.Tensor | None = None) -> tf.Tensor:
        """Returns x with its mask applied; without keys (evaluation, sampling) x itself."""
        if keys is None or self.rate == 0.0:
            return x
        kept = self.mask(keys, tf.shape(x)[1], tf.shape(x)[2])
        scale = tf.constant(1.0 / (1.0 - self.rate), x.dtype)
        return tf.where(kept, x * scale, tf.zeros([], x.dtype))

    def mask(self, keys: tf.Tensor, time: tf.Tensor, dim: tf.Tensor) -> tf.Tensor:
        """Which elements are kept: bool, shape (batch, time, dim)."""
        row = mix(keys ^ uint32(self.layer_key))[:, tf.newaxis, tf.newaxis]
        elements = mix(tf.cast(tf.reshape(tf.range(time * dim), [1, time, dim]), tf.uint32))
        threshold = uint32(int(self.rate * 2**32))
        return mix(elements ^ row) >= threshold

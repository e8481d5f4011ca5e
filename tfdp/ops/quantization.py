"""Tensors in few bits, for what travels between islands: bfloat16, or integers of 8 or 4 bits with a scale per block.

A block is up to `BLOCK` numbers of one tensor; its scale makes its largest number the largest integer, 127 or 7 (as in
QSGD, Alistarh et al. 2017, with rounding to the nearest instead of a random one: the error is kept by the sender and
added the next time, Seide et al. 2014, Karimireddy et al. 2019). Everything is a pure function of the numbers.
"""

import math
from collections.abc import Sequence

import tensorflow as tf

from tfdp.ops.packing import BLOCK, DeltaType, count_words

_LARGEST = {"int8": 127, "int4": 7}


class Encoding:
    """Lays tensors of known shapes into one vector of int32 words, and takes them out of it again.

    Args:
      shapes: of the tensors.
      dtype: what a number becomes.

    Attributes:
      num_words: of the vector; a word is 4 bytes.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: DeltaType) -> None:
        self._shapes, self._dtype = [tuple(shape) for shape in shapes], dtype
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self._words = [sum(self._parts(size)) for size in self._sizes]
        self.num_words = sum(self._words)

    def encode(self, tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        """float32 tensors -> int32 (num_words,)."""
        return tf.concat([self._encode(tf.reshape(tensor, [-1])) for tensor in tensors], axis=0)

    def decode(self, words: tf.Tensor) -> list[tf.Tensor]:
        """The tensors, as near as the type allows."""
        parts = zip(tf.split(words, self._words), self._sizes, self._shapes, strict=True)
        return [tf.reshape(self._decode(part, size), shape) for part, size, shape in parts]

    def _parts(self, size: int) -> tuple[int, int]:
        return count_words(size, self._dtype)

    def _encode(self, flat: tf.Tensor) -> tf.Tensor:
        size = int(flat.shape[0])
        num_words, num_scales = self._parts(size)
        if self._dtype == "float32":
            return tf.bitcast(flat, tf.int32)
        if self._dtype == "bfloat16":
            pairs = tf.cast(_padded(flat, 2 * num_words), tf.bfloat16)
            return tf.bitcast(tf.reshape(pairs, [num_words, 2]), tf.int32)
        largest = _LARGEST[self._dtype]
        blocks = tf.reshape(_padded(flat, num_scales * BLOCK), [num_scales, BLOCK])
        scales = tf.reduce_max(tf.abs(blocks), axis=1) / largest
        divisors = tf.where(scales > 0, scales, 1.0)[:, tf.newaxis]
        codes = tf.clip_by_value(tf.round(blocks / divisors), -largest, largest)
        codes = tf.reshape(tf.cast(codes, tf.int32), [-1])[:size]
        return tf.concat([_pack(codes, num_words, self._dtype), tf.bitcast(scales, tf.int32)], axis=0)

    def _decode(self, words: tf.Tensor, size: int) -> tf.Tensor:
        num_words, _ = self._parts(size)
        if self._dtype == "float32":
            return tf.bitcast(words, tf.float32)
        if self._dtype == "bfloat16":
            return tf.reshape(tf.cast(tf.bitcast(words, tf.bfloat16), tf.float32), [-1])[:size]
        codes = tf.cast(_unpack(words[:num_words], size, self._dtype), tf.float32)
        scales = tf.bitcast(words[num_words:], tf.float32)
        return codes * tf.repeat(scales, BLOCK)[:size]


def _padded(flat: tf.Tensor, size: int) -> tf.Tensor:
    return tf.pad(flat, [[0, size - int(flat.shape[0])]])


def _pack(codes: tf.Tensor, num_words: int, dtype: DeltaType) -> tf.Tensor:
    """Signed codes -> words, the first code in the lowest bits."""
    bits = 8 if dtype == "int8" else 4
    count = 32 // bits
    fields = tf.bitwise.bitwise_and(_padded(codes, num_words * count), (1 << bits) - 1)
    shifted = tf.bitwise.left_shift(tf.reshape(fields, [num_words, count]), tf.range(count) * bits)
    words = shifted[:, 0]
    for index in range(1, count):
        words = tf.bitwise.bitwise_or(words, shifted[:, index])
    return words


def _unpack(words: tf.Tensor, size: int, dtype: DeltaType) -> tf.Tensor:
    bits = 8 if dtype == "int8" else 4
    count = 32 // bits
    # to the top and down again: an arithmetic shift brings the sign along
    lifted = tf.bitwise.left_shift(words[:, tf.newaxis], 32 - bits - tf.range(count) * bits)
    return tf.reshape(tf.bitwise.right_shift(lifted, 32 - bits), [-1])[:size]

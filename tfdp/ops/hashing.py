"""Random bits that are functions of keys: of seed, step, layer and sequence, and of nothing else."""

import tensorflow as tf


def sequence_keys(seed: int, step: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
    """Keys of the sequences of one step: int64 positions of shape (rows,) -> uint32 keys of shape (rows,)."""
    low, high = _halves(tf.cast(position, tf.int64))
    step_low, step_high = _halves(tf.cast(step, tf.int64))
    seed_low, seed_high = _halves(tf.constant(seed, tf.int64))
    key = mix(seed_low)
    for word in (seed_high, step_low, step_high):
        key = mix(key ^ word)
    return mix(mix(key ^ low) ^ high)


def mix(x: tf.Tensor) -> tf.Tensor:
    """A bijection of uint32 in which every input bit flips every output bit with probability near 1/2."""
    x = x ^ tf.bitwise.right_shift(x, uint32(16))
    x = x * uint32(0x7FEB352D)
    x = x ^ tf.bitwise.right_shift(x, uint32(15))
    x = x * uint32(0x846CA68B)
    return x ^ tf.bitwise.right_shift(x, uint32(16))


def _halves(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    low = tf.cast(tf.bitwise.bitwise_and(x, tf.constant(0xFFFFFFFF, tf.int64)), tf.uint32)
    return low, tf.cast(tf.bitwise.right_shift(x, tf.constant(32, tf.int64)), tf.uint32)


def uint32(value: int) -> tf.Tensor:
    return tf.constant(value, tf.uint32)

"""The sentinel: do all replicas still hold the same weights and optimizer state?

Replicas that apply the same update to the same weights stay equal to the bit. A flipped bit, a failing device
or a bug breaks that silently: from then on each replica computes the gradient of another model. So every
`training.verify_every` steps each replica lays digests of what it holds into a slot of the vector that the step sums
over the replicas anyway; so the sum holds the digests of all. They are compared before each save too.

A digest is 32 bits: the sum over the elements of a hash of (bits, index). The hash is a bijection of the bits, so a
change of one element always changes the digest, and integer sums have no order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from tfdp.ops.hashing import mix


@dataclass(frozen=True)
class Disagreement:
    """Replicas that hold different tensors."""

    tensor: str  # the first one that differs
    replicas: tuple[int, ...]  # the minority, or all of them where no value has a majority
    has_majority: bool


def digests(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Digests of tensors: float32 (len(tensors), 2), the low and the high 16 bits of each.

    Tensors of other than 32 bits an element are digested as float32, which state of an optimizer may be.
    """
    sums = []
    for tensor in tensors:
        words = tensor if tensor.dtype.size == 4 else tf.cast(tensor, tf.float32)
        bits = tf.bitcast(tf.reshape(words, [-1]), tf.uint32)
        index = mix(tf.cast(tf.range(bits.shape[0]), tf.uint32))
        sums.append(tf.reduce_sum(mix(bits ^ index)))
    found = tf.stack(sums)
    low = tf.bitwise.bitwise_and(found, tf.constant(0xFFFF, tf.uint32))
    high = tf.bitwise.right_shift(found, tf.constant(16, tf.uint32))
    return tf.cast(tf.stack([low, high], axis=1), tf.float32)


def agree(all_digests: tf.Tensor) -> tf.Tensor:
    """Whether the digests (replicas, tensors, 2) of all replicas are the same: bool scalar."""
    return tf.reduce_all(all_digests == all_digests[:1])


def find_disagreement(all_digests: np.ndarray, names: Sequence[str]) -> Disagreement:
    """Names the first tensor that differs and the replicas that are not with the majority."""
    differs = np.any(all_digests != all_digests[:1], axis=(0, 2))
    tensor = int(np.argmax(differs))
    values = [tuple(row) for row in all_digests[:, tensor].tolist()]
    most_common = max(values, key=values.count)
    has_majority = 2 * values.count(most_common) > len(values)
    replicas = [index for index, value in enumerate(values) if not has_majority or value != most_common]
    return Disagreement(names[tensor], tuple(replicas), has_majority)

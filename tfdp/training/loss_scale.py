"""The loss scale of float16: the factor of the loss that keeps small gradients above what float16 can hold.

Where the scale makes a gradient too large for float16 it is not finite, after the reduction on all replicas: so all of
them repeat the step at half the scale (Micikevicius et al. 2018 skip the step instead). No batch is lost, the sequences
of a step do not depend on the scale, and powers of two change nothing but what float16 rounds.

A scaling is a float32 (3,): the scale, the steps since it last changed, and the overflows of the run so far.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfdp.training.step_statistics import StepStatistics

FIRST = (
    2.0**10
)  # of the sum over the tokens of a micro-batch; the usual 65536 of their mean is about this with 64 tokens
LEAST, MOST = 2.0**-16, 2.0**24
STEPS_TO_GROW = 1000  # without an overflow, before a scale twice as large is tried


def from_state(state: Sequence[float] | None, scales: bool) -> np.ndarray:
    """What a checkpoint holds, or where a run starts; the scale is 1 for one that scales nothing."""
    if state is None or not scales:
        return np.array([FIRST if scales else 1.0, 0.0, 0.0], np.float32)
    return np.array(state, np.float32)


def overflowed(found: StepStatistics, num_weights: int) -> tf.Tensor:
    """Whether a smaller scale may help a step: a gradient is not finite, and the loss is, before scaling."""
    return (found.refused >= 0) & (found.refused < num_weights) & tf.math.is_finite(found.loss)


def after_overflow(scaling: tf.Tensor) -> tf.Tensor:
    return tf.stack([scaling[0] / 2, 0.0, scaling[2] + 1])


def after_step(scaling: tf.Tensor) -> tf.Tensor:
    """One more step without an overflow; now and then the scale grows."""
    grows = scaling[1] + 1 >= STEPS_TO_GROW
    scale = tf.where(grows, tf.minimum(2 * scaling[0], MOST), scaling[0])
    return tf.stack([scale, tf.where(grows, 0.0, scaling[1] + 1), scaling[2]])

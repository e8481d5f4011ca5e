"""Spikes: steps that should not be applied, and the sequences that caused them.

A step is a spike if a gradient or its loss is not finite, or if its loss lies far above those before it: above the
median of the last 5 by `threshold` times the noise of the last 50. The noise is the standard deviation that the median
absolute deviation of their second differences implies (a robust form of the estimators of von Neumann and of Gasser et
al. 1986), which the fall of a young run's loss does not inflate; it is taken to be at least 1 % of the loss. The losses
are those after the reduction and the rule is a pure function of them, so all workers come to the same verdict, under
every layout and after a resume.
"""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

WINDOW = 50  # losses looked back on
ENOUGH = 30  # losses before there is a verdict; the noise of 20 is now and then a third of what it should be
_LEVEL = 5  # losses whose median is the present level
_MAD_TO_STDDEV = 1.4826  # of a normal distribution
_LEAST_NOISE = 0.01  # of the level


def loss_limit(recent: tf.Tensor, threshold: float | None) -> tf.Tensor:
    """The largest next loss that is no spike; infinite before there are enough.

    Args:
      recent: float32 (WINDOW,), the newest loss last; empty places are infinite.
      threshold: in robust standard deviations; None: no limit.
    """
    if threshold is None:
        return tf.constant(math.inf)
    level = _median(recent[-_LEVEL:])
    bends = recent[2:] - 2 * recent[1:-1] + recent[:-2]  # not finite beside an empty place; variance 6 noise**2
    noise = _MAD_TO_STDDEV * _median(tf.abs(bends - _median(bends))) / math.sqrt(6)
    limit = level + threshold * tf.maximum(noise, _LEAST_NOISE * tf.abs(level))
    count = tf.reduce_sum(tf.cast(tf.math.is_finite(recent), tf.int32))
    return tf.where(count >= ENOUGH, limit, math.inf)


def _median(values: tf.Tensor) -> tf.Tensor:
    """The upper median of the values that are finite."""
    present = tf.math.is_finite(values)
    count = tf.reduce_sum(tf.cast(present, tf.int32))
    return tf.sort(tf.where(present, values, math.inf))[tf.minimum(count // 2, values.shape[0] - 1)]


def offending_rows(row_losses: np.ndarray, threshold: float | None) -> list[int]:
    """The rows of a batch that stand out: a loss that is not finite, or one far above the median of the rows.

    Args:
      row_losses: mean loss of each row, (rows,), of four rows or more for a verdict on finite ones.
      threshold: in robust standard deviations (Hampel 1974); None: finite losses do not stand out.
    """
    finite = row_losses[np.isfinite(row_losses)]
    limit = math.inf
    if threshold is not None and len(finite) >= 4:
        median = float(np.median(finite))
        noise = _MAD_TO_STDDEV * float(np.median(np.abs(finite - median)))
        limit = median + threshold * max(noise, _LEAST_NOISE * abs(median))
    return [index for index, loss in enumerate(row_losses) if not math.isfinite(loss) or loss > limit]


def recent_to_state(recent: np.ndarray) -> list[float]:
    """The window of recent losses without its empty places, for JSON."""
    return [float(loss) for loss in recent[np.isfinite(recent)]]


def recent_from_state(losses: Sequence[float]) -> np.ndarray:
    """The window again: float32 (WINDOW,), the newest last, empty places infinite."""
    window = np.full(WINDOW, math.inf, np.float32)
    if losses:
        window[-len(losses) :] = losses
    return window

"""The learning rate by step."""

import math
from collections.abc import Callable

import tensorflow as tf

from tfdp.config.sections import OptimizerConfig

Schedule = Callable[[tf.Tensor], tf.Tensor]


def make_schedule(config: OptimizerConfig, num_steps: int) -> Schedule:
    """The learning rate as a function of the step: int64 scalar (first step 0) -> float32 scalar.

    Warm-up is linear, from peak / warmup_steps at step 0 to the peak; then the rate is constant, or decays
    to final_fraction of the peak at the last step: linearly, along a half cosine, or linearly over the last
    decay_fraction of the steps (wsd: warm-up, stable, decay; Hu et al. 2024).
    """
    num_steps = config.schedule_steps or num_steps
    warmup, last = config.warmup_steps, max(num_steps - 1, 1)
    decay_start = warmup
    if config.schedule == "wsd":
        decay_start = max(warmup, num_steps - max(1, round(config.decay_fraction * num_steps)))

    def learning_rate(step: tf.Tensor) -> tf.Tensor:
        now = tf.cast(step, tf.float32)
        rising = tf.minimum(1.0, (now + 1.0) / max(warmup, 1))
        decayed = tf.clip_by_value(1.0 - (last - now) / max(last - decay_start, 1), 0.0, 1.0)
        if config.schedule == "constant":
            return config.learning_rate * rising
        left = 0.5 * (1.0 + tf.cos(math.pi * decayed)) if config.schedule == "cosine" else 1.0 - decayed
        return config.learning_rate * rising * (config.final_fraction + (1.0 - config.final_fraction) * left)

    return learning_rate

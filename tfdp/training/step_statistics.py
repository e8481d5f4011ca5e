"""The outcome of a step: named numbers, sent and kept as one vector."""

from typing import Any, NamedTuple

import tensorflow as tf

_NUM_SCALARS = 6


class StepStatistics(NamedTuple):
    """The statistics of one step, over all replicas; of several steps, each field has their axis in front.

    In a graph they are one float32 vector, so that a loop of steps keeps one row for each of them.
    """

    loss: Any  # nats per valid token, mean over the global batch
    grad_norm: Any  # global norm of the mean gradient, before clipping
    learning_rate: Any
    num_tokens: Any  # valid tokens of the global batch
    refused: Any  # index of the first tensor that is not finite, num_weights for the loss, one more for a spike; or -1
    limit: Any  # the largest loss that is no spike
    source_losses: Any  # (num_sources,) sums over the tokens of each source, in nats
    source_tokens: Any  # (num_sources,) valid tokens of each source

    @staticmethod
    def size(num_sources: int) -> int:
        """Numbers of the vector."""
        return _NUM_SCALARS + 2 * num_sources

    def to_vector(self) -> tf.Tensor:
        scalars = [tf.cast(value, tf.float32) for value in self[:_NUM_SCALARS]]
        return tf.concat([tf.stack(scalars), self.source_losses, self.source_tokens], axis=0)

    @classmethod
    def from_vector(cls, vector: Any) -> "StepStatistics":
        """The statistics in a vector; or in (steps, size) of them, as a tensor or an array."""
        num_sources = (vector.shape[-1] - _NUM_SCALARS) // 2
        loss, grad_norm, learning_rate, num_tokens, refused, limit = (vector[..., at] for at in range(_NUM_SCALARS))
        losses, tokens = vector[..., _NUM_SCALARS:-num_sources], vector[..., -num_sources:]
        return cls(loss, grad_norm, learning_rate, num_tokens, refused, limit, losses, tokens)

    @property
    def was_applied(self) -> Any:
        """Whether nothing was refused."""
        return self.refused < 0

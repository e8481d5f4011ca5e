"""The outcome of a step, named numbers that are sent and kept as one vector; and of the steps of a call."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfdp.parallel.consistency import Disagreement
from tfdp.training.ledger import Spike

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


@dataclass(frozen=True)
class StepResults:
    """What a call of the train step did: arrays over the steps that it ran, in order."""

    loss: np.ndarray  # nats per valid token, mean over the global batch
    grad_norm: np.ndarray  # global norm before clipping
    learning_rate: np.ndarray
    num_tokens: np.ndarray  # valid tokens of the global batch
    source_losses: np.ndarray  # (steps, sources), sums over the tokens of each source, in nats
    source_tokens: np.ndarray  # (steps, sources), valid tokens of each
    skipped: list[Spike]  # steps among these whose update was left out
    spike: Spike | None  # the step after these, which ended the call; its update was not applied
    disagreement: Disagreement | None  # found in the step after these; its update was not applied
    stopped: bool  # whether a stop was requested, on any worker
    time_is_up: bool  # whether the chief has requested the end of the run, and nobody a stop
    seconds: np.ndarray  # of `PHASES`, over all steps that were begun; waiting for other replicas is reduction

    @classmethod
    def of_islands(
        cls,
        each: StepStatistics,
        skipped: list[Spike],
        spike: Spike | None,
        disagreement: Disagreement | None,
        requests: float,
        seconds: np.ndarray,
    ) -> "StepResults":
        """The steps of several islands as steps of one run: its loss is the mean over the tokens of all.

        Args:
          each: of (islands, steps); the norm of a gradient becomes the mean over the islands.
          skipped, spike, disagreement, seconds: as above.
          requests: the sum over the replicas, see `Requests`.
        """
        losses = each.source_losses.astype(np.float64).sum(axis=0)
        tokens = each.source_tokens.astype(np.float64).sum(axis=0)
        return cls(
            (losses.sum(axis=1) / np.maximum(tokens.sum(axis=1), 1.0)).astype(np.float32),
            each.grad_norm.mean(axis=0),
            each.learning_rate[0],
            tokens.sum(axis=1).astype(np.int64),
            losses,
            tokens.astype(np.int64),
            skipped,
            spike,
            disagreement,
            stopped=requests >= 1,
            time_is_up=0 < requests < 1,
            seconds=seconds,
        )

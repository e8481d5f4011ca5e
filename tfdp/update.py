"""What a step does with the sums over all replicas: divide, measure, decide, clip, apply.

The decision is taken before anything is written: an update that is refused does not run at all, so one that runs can
write each weight over its old value, in one pass over memory.
"""

import math
from collections.abc import Sequence

import keras
import tensorflow as tf

from tfdp import sentinel
from tfdp.buckets import Buckets
from tfdp.optimizer import Group, Optimizer, Schedule
from tfdp.sums import fixed_sum

NUM_TOLD = 6  # numbers of a row, before those of each source


class Packed:
    """Lays small float32 tensors of known shapes end to end in one vector."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self._shapes = list(shapes)
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self.size = sum(self._sizes)

    @staticmethod
    def pack(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)

    def unpack(self, vector: tf.Tensor) -> list[tf.Tensor]:
        parts = tf.split(vector, self._sizes)
        return [tf.reshape(part, shape) for part, shape in zip(parts, self._shapes, strict=True)]


class Update:
    """Applies summed gradients to this replica's weights; to be called in a replica context.

    Args:
      optimizer: with the weights.
      schedule: the learning rate by step.
      clip_norm: largest global norm of the mean gradient; None: no clipping.
      told: how the small sums are laid out: losses and tokens of each source, stop requests, digests.
      buckets: how the gradients are laid out; None: one by one.
      compiled: whether XLA compiles the update.
      num_groups: parts of the weights that are updated at the same time, each on cores of its own.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        clip_norm: float | None,
        told: Packed,
        buckets: Buckets | None,
        compiled: bool,
        num_groups: int = 1,
    ) -> None:
        self._optimizer, self._schedule, self._clip_norm = optimizer, schedule, clip_norm
        self._told, self._buckets = told, buckets
        self._measure = tf.function(self._measure_sums, jit_compile=compiled, autograph=False)
        self._groups = [
            tf.function(
                lambda *sums, group=group: self._apply_group(group, *sums), jit_compile=compiled, autograph=False
            )
            for group in optimizer.groups(num_groups if compiled else 1)
        ]

    def __call__(
        self, packs: list[tf.Tensor], told: tf.Tensor, step: tf.Tensor, limit: tf.Tensor, scale: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Divides, clips and applies the sums over all replicas; `scale` is that of the loss.

        Nothing is applied where something is not finite, the loss is above the limit, or the replicas disagree.

        Returns:
          The row (loss, grad_norm, learning_rate, num_tokens, refused, limit, losses and tokens of each source),
          where refused is the index of the first tensor that is not finite (the number of weights stands for the
          loss, one more for a loss above the limit) or -1; the digests of all replicas; the number of replicas that
          were asked to stop; and a number that is there once the weights are written.
        """
        row, factor, applies, digests, stop = self._measure(packs, told, step, limit, scale)

        def apply() -> tf.Tensor:
            return tf.add_n([group(packs, factor, row[2], step) for group in self._groups])

        return row, digests, stop, tf.cond(applies, apply, lambda: tf.constant(0.0))

    def _measure_sums(
        self, packs: list[tf.Tensor], told: tf.Tensor, step: tf.Tensor, limit: tf.Tensor, scale: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        """The row, the factor that turns sums into clipped means, whether the update applies, the digests and the stop
        requests."""
        loss_sums, counts, stop, digests = self._told.unpack(told)
        loss_sum, count = fixed_sum(loss_sums), fixed_sum(counts)
        loss = loss_sum / tf.maximum(count, 1.0)
        # A factor, because XLA computes a product again in each pass that needs it, and writes quotients to memory.
        factor = 1.0 / (tf.maximum(count, 1.0) * scale)
        squares = tf.stack([fixed_sum(tf.square(_scaled(total, factor))) for total in self._sums(packs)])
        grad_norm = tf.sqrt(fixed_sum(squares))
        good = tf.concat([tf.math.is_finite(tf.concat([squares, [loss]], axis=0)), [loss <= limit]], axis=0)
        all_good = tf.reduce_all(good)
        refused = tf.where(all_good, -1, tf.argmin(tf.cast(good, tf.int32), output_type=tf.int32))
        if self._clip_norm is not None:
            factor = factor * tf.minimum(1.0, self._clip_norm / tf.maximum(grad_norm, 1e-12))
        row = tf.stack([loss, grad_norm, self._schedule(step), count, tf.cast(refused, tf.float32), limit])
        applies = all_good & sentinel.agree(digests)
        return tf.concat([row, loss_sums, counts], axis=0), factor, applies, digests, stop

    def _apply_group(
        self, group: Group, packs: list[tf.Tensor], factor: tf.Tensor, learning_rate: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        """Updates the weights of a group and their state; returns a number that is there once they are written."""
        sums = self._sums(packs)
        gradients = [_scaled(sums[index], factor) for index in group.indices]
        weights = [tf.convert_to_tensor(weight.value) for weight in group.weights]
        state = [tf.convert_to_tensor(variable.value) for variable in group.state]
        weights, state = self._optimizer.update(group, weights, state, gradients, learning_rate, step)
        done = tf.constant(0.0)
        for variable, after in zip([*group.weights, *group.state], [*weights, *state], strict=True):
            assign_in_replica(variable, after)
            done = tf.cast(tf.reshape(after, [-1])[0], tf.float32)
        return done

    def _sums(self, packs: list[tf.Tensor]) -> list[tf.Tensor]:
        """The summed gradients, one for each weight."""
        return packs if self._buckets is None else self._buckets.unpack(packs)


def _scaled(total: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    return tf.cast(total, tf.float32) * factor


def assign_in_replica(variable: keras.Variable, value: tf.Tensor) -> None:
    """Assigns to this replica's own copy of a mirrored variable, and to no other.

    `variable.assign` in a replica context would ask for an aggregation over the replicas; here every replica
    computes the same value, so there is nothing to aggregate. `handle` is the copy's in a replica context.
    """
    tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=tf.cast(value, variable.dtype))

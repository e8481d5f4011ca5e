"""What a step does with the sums over all replicas: divide, measure, decide, clip, apply.

The decision is taken before anything is written: an update that is refused does not run at all, so one that runs can
write each weight over its old value, in one pass over memory. Choosing between old and new values afterwards took twice
the time.

The arithmetic is in programs of its own: one that measures, and one for each group of weights. Their inputs are the
same
in every layout: one summed gradient for each weight, and the sums of losses and tokens. So the programs are the same,
and give the same bits, whatever summed the gradients, in whatever packs. A compiler fuses what it sees together, and
rounding depends on fusion: it must not see the packs of a reduction, nor the digests of so many replicas.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdp.ops.sums import fixed_sum
from tfdp.optim.average import WeightAverage
from tfdp.optim.optimizer import Group, Optimizer
from tfdp.optim.schedule import Schedule
from tfdp.training.step_statistics import StepStatistics


class Update:
    """Applies summed gradients to this replica's weights; to be called in a replica context.

    Args:
      optimizer: with the weights.
      schedule: the learning rate by step.
      clip_norm: largest global norm of the mean gradient; None: no clipping.
      compiled: whether XLA compiles the update. Where it does not, TensorFlow's graph optimizer rewrites the update
        together with what surrounds it, so the bits depend on the layout.
      num_groups: parts of the weights, each a program of its own, which may run at the same time. It must not depend
        on the layout: another cut is another set of programs.
      average: of the weights; None: there is none. It has programs of its own, so that the weights of a run have the
        same bits with an average and without.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        clip_norm: float | None,
        compiled: bool,
        num_groups: int = 1,
        average: WeightAverage | None = None,
    ) -> None:
        self._optimizer, self._schedule, self._clip_norm, self._compiled = optimizer, schedule, clip_norm, compiled
        self._measure = tf.function(self._measure_sums, jit_compile=compiled, autograph=False)
        self._groups = [(group, self._program_of(group)) for group in optimizer.groups(num_groups if compiled else 1)]
        self._pure = [(group, self._pure_program_of(group)) for group, _ in self._groups]
        self._averaging = [] if average is None else [self._averaging_of(average, group) for group, _ in self._groups]

    def _program_of(self, group: Group) -> Callable[..., tf.Tensor]:
        def apply_group(*sums: Any) -> tf.Tensor:
            return self._apply_group(group, *sums)

        return tf.function(apply_group, jit_compile=self._compiled, autograph=False)

    def _pure_program_of(self, group: Group) -> Callable[..., tuple[list[tf.Tensor], list[tf.Tensor]]]:
        def values_of_group(*given: Any) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
            return self._values_of_group(group, *given)

        return tf.function(values_of_group, jit_compile=self._compiled, autograph=False)

    def _averaging_of(self, average: WeightAverage, group: Group) -> Callable[[tf.Tensor], tf.Tensor]:
        variables = [average.variables[index] for index in group.indices]

        def average_group(step: tf.Tensor) -> tf.Tensor:
            return assign_all(variables, average.update(group.weights, variables, step))

        return tf.function(average_group, jit_compile=self._compiled, autograph=False)

    def __call__(
        self,
        gradients: Sequence[tf.Tensor],
        losses: tuple[tf.Tensor, tf.Tensor],
        agreed: tf.Tensor,
        step: tf.Tensor,
        limit: tf.Tensor,
        scale: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Divides, clips and applies sums over all replicas.

        Nothing is applied where something is not finite, the loss is above the limit, or the replicas disagree.

        Args:
          gradients: summed, one for each weight.
          losses: sums of losses and numbers of tokens, (num_sources,) each.
          agreed: whether all replicas hold the same, bool scalar.
          step: int64 scalar, the number of updates before this one.
          limit: the largest loss that is no spike.
          scale: of the loss whose gradients these are.

        Returns:
          The vector of `StepStatistics`, and a scalar that depends on the written weights.
        """
        statistics, factor, good = self._measure(gradients, *losses, step, limit, scale)

        def apply() -> tf.Tensor:
            learning_rate = StepStatistics.from_vector(statistics).learning_rate
            written = [
                function([gradients[index] for index in group.indices], factor, learning_rate, step)
                for group, function in self._groups
            ]
            with tf.control_dependencies(written):
                averaged = [function(step) for function in self._averaging]
            return tf.add_n([*written, *averaged])

        return statistics, tf.cond(good & agreed, apply, lambda: tf.constant(0.0))

    def values(
        self,
        weights: Sequence[tf.Tensor],
        state: Sequence[tf.Tensor],
        gradients: Sequence[tf.Tensor],
        losses: tuple[tf.Tensor, tf.Tensor],
        step: tf.Tensor,
        limit: tf.Tensor,
    ) -> tuple[list[tf.Tensor], list[tf.Tensor], tf.Tensor]:
        """The same without side effects, on weights and state that are given.

        Returns:
          The new weights and the new state, or the old ones where the update is refused; the vector of
          `StepStatistics`.
        """
        statistics, factor, good = self._measure(gradients, *losses, step, limit, tf.constant(1.0))

        def apply() -> tuple[list[tf.Tensor], list[tf.Tensor]]:
            learning_rate = StepStatistics.from_vector(statistics).learning_rate
            new_weights, new_state = list(weights), list(state)
            for group, function in self._pure:
                of_weights, of_state = function(
                    [weights[index] for index in group.indices],
                    [state[index] for index in group.state_indices],
                    [gradients[index] for index in group.indices],
                    factor,
                    learning_rate,
                    step,
                )
                for index, value in zip(group.indices, of_weights, strict=True):
                    new_weights[index] = value
                for index, value in zip(group.state_indices, of_state, strict=True):
                    new_state[index] = value
            return new_weights, new_state

        new_weights, new_state = tf.cond(good, apply, lambda: (list(weights), list(state)))
        return new_weights, new_state, statistics

    def _measure_sums(
        self,
        gradients: Sequence[tf.Tensor],
        loss_sums: tf.Tensor,
        counts: tf.Tensor,
        step: tf.Tensor,
        limit: tf.Tensor,
        scale: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The statistics, the factor that turns sums into clipped means, and whether all numbers are good."""
        loss_sum, count = fixed_sum(loss_sums), fixed_sum(counts)
        loss = loss_sum / tf.maximum(count, 1.0)
        # A factor, not a quotient: XLA recomputes a product in each pass that needs it, but writes a quotient to
        # memory.
        factor = 1.0 / (tf.maximum(count, 1.0) * scale)
        squares = tf.stack([fixed_sum(tf.square(_scaled(total, factor))) for total in gradients])
        grad_norm = tf.sqrt(fixed_sum(squares))
        good = tf.concat([tf.math.is_finite(tf.concat([squares, [loss]], axis=0)), [loss <= limit]], axis=0)
        all_good = tf.reduce_all(good)
        refused = tf.where(all_good, -1, tf.argmin(tf.cast(good, tf.int32), output_type=tf.int32))
        if self._clip_norm is not None:
            factor = factor * tf.minimum(1.0, self._clip_norm / tf.maximum(grad_norm, 1e-12))
        found = StepStatistics(loss, grad_norm, self._schedule(step), count, refused, limit, loss_sums, counts)
        return found.to_vector(), factor, all_good

    def _apply_group(
        self, group: Group, sums: Sequence[tf.Tensor], factor: tf.Tensor, learning_rate: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        """Updates the weights of a group and their state; returns a scalar that depends on the written values."""
        weights = [tf.convert_to_tensor(weight.value) for weight in group.weights]
        state = [tf.convert_to_tensor(variable.value) for variable in group.state]
        weights, state = self._values_of_group(group, weights, state, sums, factor, learning_rate, step)
        return assign_all([*group.weights, *group.state], [*weights, *state])

    def _values_of_group(
        self,
        group: Group,
        weights: Sequence[tf.Tensor],
        state: Sequence[tf.Tensor],
        sums: Sequence[tf.Tensor],
        factor: tf.Tensor,
        learning_rate: tf.Tensor,
        step: tf.Tensor,
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        gradients = [_scaled(total, factor) for total in sums]
        return self._optimizer.update(group, weights, state, gradients, learning_rate, step)


def _scaled(total: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    return tf.cast(total, tf.float32) * factor


def assign_all(variables: Sequence[keras.Variable], values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Assigns to this replica's own copies; returns a scalar that depends on the last value."""
    done = tf.constant(0.0)
    for variable, value in zip(variables, values, strict=True):
        assign_in_replica(variable, value)
        done = tf.cast(tf.reshape(value, [-1])[0], tf.float32)
    return done


def assign_in_replica(variable: keras.Variable, value: tf.Tensor) -> None:
    """Assigns to this replica's own copy of a mirrored variable, and to no other.

    `variable.assign` in a replica context would ask for an aggregation over the replicas; here every replica
    computes the same value, so there is nothing to aggregate. `handle` is the copy's in a replica context.
    """
    tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=tf.cast(value, variable.dtype))

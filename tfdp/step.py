"""One optimizer step: accumulate -> reduce -> divide -> clip -> apply.

A replica sums, over its micro-batches, the gradient of the summed token losses, that sum, and the number of
valid tokens. All of it travels in one vector, which is summed over the replicas in one collective per
step, whatever the accumulation. Only then is anything divided (by the global token count), measured (the
global norm), clipped and applied, by every replica to its own copy of the weights: the same arithmetic on
the same numbers, so the copies stay equal.

Keras and `tf.distribute` would do otherwise: a mean per replica, a clip per replica, a second sum inside the
optimizer. Nothing here knows of files, models or metrics; a task enters as a function from rows to sums.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdp import distribution
from tfdp.data import Batch
from tfdp.losses import Sums
from tfdp.optimizer import Optimizer, Schedule

LossFunction = Callable[[Batch, tf.Tensor], Sums]  # (rows of one micro-batch, step) -> (sum of losses, count)


@dataclass(frozen=True)
class StepResults:
    """What a call of the train step did: arrays over the steps that it ran, in order."""

    loss: np.ndarray  # nats per valid token, mean over the global batch
    grad_norm: np.ndarray  # global norm before clipping
    learning_rate: np.ndarray
    num_tokens: np.ndarray  # valid tokens of the global batch
    nonfinite: (
        str | None
    )  # the first tensor whose gradient is not finite; its step, the one after these, was not applied
    stopped: bool  # whether a stop was requested, on any worker


class TrainStep:
    """Runs optimizer steps; make it inside or outside the scope, once per run.

    Args:
      strategy: that the weights were made under.
      loss_function: sums and counts over the rows of one micro-batch.
      optimizer: with the weights.
      schedule: the learning rate by step.
      global_batch_size, microbatch_size: sequences per step, and per forward pass on one replica.
      clip_norm: largest global norm of the mean gradient; None: no clipping.
      jit_compile: whether XLA compiles the micro-batch and the update.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        loss_function: LossFunction,
        optimizer: Optimizer,
        schedule: Schedule,
        global_batch_size: int,
        microbatch_size: int,
        clip_norm: float | None,
        jit_compile: bool,
    ) -> None:
        self._strategy, self._optimizer, self._schedule = strategy, optimizer, schedule
        self._loss_function, self._clip_norm = loss_function, clip_norm
        scalars = [(), (), ()]  # the sum of the losses, the count of valid tokens, the stop requests
        self._packing = Packing([*(tuple(weight.shape) for weight in optimizer.weights), *scalars])
        self._microbatch_size = microbatch_size
        self._num_local_microbatches = global_batch_size // (microbatch_size * strategy.num_replicas_in_sync)
        self._stop_requested = tf.Variable(0.0, trainable=False, name="stop_requested")
        self._microbatch = tf.function(self._microbatch_sums, jit_compile=jit_compile)
        self._apply = tf.function(self._apply_update, jit_compile=jit_compile)
        self._run = tf.function(self._run_steps)

    def __call__(self, batches: Any, first_step: int, num_steps: int) -> StepResults:
        """Runs up to `num_steps` steps on the next batches.

        It ends early before an update that is not finite, and after the step in which a stop request arrived.

        Args:
          batches: an iterator of `data.train_batches`, standing at `first_step`.
          first_step: number of optimizer steps done before.
          num_steps: how many to run.
        """
        metrics, count, nonfinite, stop = self._run(
            batches, tf.constant(first_step, tf.int64), tf.constant(num_steps, tf.int32)
        )
        loss, grad_norm, learning_rate, num_tokens = np.asarray(metrics)[: int(count)].T
        names = [*(weight.path for weight in self._optimizer.weights), "loss"]
        name = names[int(nonfinite)] if int(nonfinite) >= 0 else None
        return StepResults(loss, grad_norm, learning_rate, num_tokens.astype(np.int64), name, float(stop) > 0)

    def request_stop(self) -> None:
        """Ends the running call after its current step, on every worker after the same one; from any thread."""
        self._stop_requested.assign(1.0)

    def _run_steps(self, batches: Any, first_step: tf.Tensor, num_steps: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Several steps in one graph, so that a short step does not wait for Python."""

        def goes_on(count: tf.Tensor, nonfinite: tf.Tensor, stop: tf.Tensor, _: tf.TensorArray) -> tf.Tensor:
            return (count < num_steps) & (nonfinite < 0) & (stop <= 0)

        def one_step(
            count: tf.Tensor, nonfinite: tf.Tensor, stop: tf.Tensor, metrics: tf.TensorArray
        ) -> tuple[tf.Tensor, ...]:
            step = first_step + tf.cast(count, tf.int64)
            per_replica = self._strategy.run(self._replica_step, args=(next(batches), step))
            values, nonfinite, stop = distribution.first_replica(self._strategy, per_replica)
            return count + tf.cast(nonfinite < 0, tf.int32), nonfinite, stop, metrics.write(count, values)

        start = (
            tf.constant(0),
            tf.constant(-1),
            tf.constant(0.0),
            tf.TensorArray(tf.float32, num_steps, element_shape=[4], clear_after_read=False),
        )
        count, nonfinite, stop, metrics = tf.while_loop(goes_on, one_step, start, parallel_iterations=1)
        return metrics.stack(), count, nonfinite, stop

    def _replica_step(self, batch: Batch, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        total = self._microbatch(self._rows(batch, 0), step)
        if self._num_local_microbatches > 1:
            _, total = tf.while_loop(
                lambda index, _: index < self._num_local_microbatches,
                lambda index, sums: (index + 1, sums + self._microbatch(self._rows(batch, index), step)),
                (tf.constant(1), total),
                parallel_iterations=1,
            )
        stop = tf.reshape(self._stop_requested.read_value(), [1])
        return self._apply(distribution.replica_sum(tf.concat([total, stop], axis=0)), step)

    def _rows(self, batch: Batch, index: int | tf.Tensor) -> Batch:
        """The rows of this replica's micro-batch `index`."""
        size = self._microbatch_size
        return {
            key: tf.ensure_shape(value[index * size : (index + 1) * size], [size, *value.shape[1:]])
            for key, value in batch.items()
        }

    def _microbatch_sums(self, rows: Batch, step: tf.Tensor) -> tf.Tensor:
        """Gradient of the summed loss, the sum and the count, packed into one float32 vector."""
        weights = [weight.value for weight in self._optimizer.weights]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            loss_sum, count = self._loss_function(rows, step)
        gradients = tape.gradient(loss_sum, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return self._packing.pack([*(tf.convert_to_tensor(gradient) for gradient in gradients), loss_sum, count])

    def _apply_update(self, total: tf.Tensor, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Divides, clips and applies the global sums to this replica's weights.

        Returns:
          The row (loss, grad_norm, learning_rate, num_tokens); the index of the first tensor that is not
          finite (the number of weights stands for the loss), or -1 (if there is one, nothing is applied); and
          the number of replicas that were asked to stop.
        """
        *gradient_sums, loss_sum, count, stop = self._packing.unpack(total)
        gradients = [gradient / tf.maximum(count, 1.0) for gradient in gradient_sums]
        loss = loss_sum / tf.maximum(count, 1.0)
        squares = tf.stack([tf.reduce_sum(tf.square(gradient)) for gradient in gradients])
        grad_norm = tf.sqrt(tf.reduce_sum(squares))
        finite = tf.math.is_finite(tf.concat([squares, [loss]], axis=0))
        all_finite = tf.reduce_all(finite)
        nonfinite = tf.where(all_finite, -1, tf.argmin(tf.cast(finite, tf.int32), output_type=tf.int32))
        if self._clip_norm is not None:
            scale = tf.minimum(1.0, self._clip_norm / tf.maximum(grad_norm, 1e-12))
            gradients = [gradient * scale for gradient in gradients]
        learning_rate = self._schedule(step)
        variables = [*self._optimizer.weights, *self._optimizer.state]
        old = [tf.convert_to_tensor(variable.value) for variable in variables]
        split = len(self._optimizer.weights)
        weights, state = self._optimizer.update(old[:split], old[split:], gradients, learning_rate, step)
        for variable, before, after in zip(variables, old, [*weights, *state], strict=True):
            assign_in_replica(variable, tf.where(all_finite, after, before))
        return tf.stack([loss, grad_norm, learning_rate, count]), nonfinite, stop


class EvalStep:
    """Sums losses and counts over the batches of a split, without touching anything."""

    def __init__(self, strategy: tf.distribute.Strategy, loss_function: LossFunction, jit_compile: bool) -> None:
        self._strategy, self._loss_function = strategy, loss_function
        self._replica = tf.function(self._replica_sums, jit_compile=jit_compile)
        self._run = tf.function(self._run_batches)

    def __call__(self, batches: Any, num_batches: int) -> tuple[float, int]:
        """Returns the sum of the losses in nats and the number of valid tokens, over all replicas."""
        loss_sum, count = self._run(batches, tf.constant(num_batches))
        return float(loss_sum), int(count)

    def _run_batches(self, batches: Any, num_batches: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        def add(index: tf.Tensor, totals: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            per_replica = self._strategy.run(self._summed, args=(next(batches),))
            sums = distribution.first_replica(self._strategy, per_replica)
            return index + 1, totals + tf.cast(sums, tf.float64)

        start = (tf.constant(0), tf.zeros([2], tf.float64))
        _, totals = tf.while_loop(lambda index, _: index < num_batches, add, start, parallel_iterations=1)
        return totals[0], totals[1]

    def _summed(self, batch: Batch) -> tf.Tensor:
        return distribution.replica_sum(self._replica(batch))

    def _replica_sums(self, batch: Batch) -> tf.Tensor:
        return tf.stack(self._loss_function(batch, tf.constant(0, tf.int64)))


class Packing:
    """Lays tensors of known shapes end to end in one vector."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = list(shapes)
        self.sizes = [math.prod(shape) for shape in self.shapes]

    def pack(self, tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)

    def unpack(self, vector: tf.Tensor) -> list[tf.Tensor]:
        parts = tf.split(vector, self.sizes)
        return [tf.reshape(part, shape) for part, shape in zip(parts, self.shapes, strict=True)]


def assign_in_replica(variable: keras.Variable, value: tf.Tensor) -> None:
    """Assigns to this replica's own copy of a mirrored variable, and to no other.

    `variable.assign` in a replica context would ask for an aggregation over the replicas; here every replica
    computes the same value, so there is nothing to aggregate. `handle` is the copy's in a replica context.
    """
    tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=tf.cast(value, variable.dtype))


def default_jit_compile(choice: bool | str, precision: str, on_gpu: bool) -> bool:
    """Resolves `training.jit_compile`: auto is XLA, but oneDNN for bfloat16 on CPUs.

    XLA's CPU backend computes bfloat16 products in float32; oneDNN has real ones.
    """
    return on_gpu or precision == "float32" if choice == "auto" else bool(choice)

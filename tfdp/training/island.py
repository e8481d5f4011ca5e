"""What one island does: some optimizer steps on its own rows, as a pure function.

An island is a share of the run, not of the machine: one of `distribution.num_islands` models that learn apart from one
another for a round of steps, each on its own rows of every global batch and with an optimizer state of its own. A round
takes weights, state and rows, and returns the new ones; it writes no variable. So whoever computes it, once or twice,
gets the same bits: that is what lets any number of replicas and workers carry the islands of a run.

What is compiled is compiled alone, and micro-batches are summed in the tree of sums.py, as for canonical sums, because
what surrounds a round must not change its bits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from tfdp.data import pipeline
from tfdp.ops.sums import tree_sum
from tfdp.optim.optimizer import Optimizer
from tfdp.tasks.task import LossFunction, Rows
from tfdp.training import spikes
from tfdp.training.changes import Changes
from tfdp.training.compilation import Compilation
from tfdp.training.step_statistics import StepStatistics
from tfdp.training.update import Update

Tensors = list[tf.Tensor]


class IslandState(NamedTuple):
    """What an island keeps from one round to the next: not the weights, which are the same for all at its start."""

    optimizer: Tensors  # in the order of the optimizer's state
    recent_losses: tf.Tensor  # (spikes.WINDOW,), which spikes are judged by
    errors: Tensors  # what its messages have lost so far, like the weights; nothing where they lose nothing


class Round(NamedTuple):
    """What an island comes to in a round."""

    message: Tensors  # of its change, see `changes.py`
    state: IslandState
    tokens: tf.Tensor  # that it learned from, a scalar
    statistics: tf.Tensor  # (steps, size of StepStatistics), of this island alone


class Island:
    """Computes rounds; every island of a run is this same function.

    Args:
      loss_function: sums and counts over the rows of one micro-batch.
      optimizer: with the weights; its variables, and those of the model, are neither read nor written.
      update: what divides, clips and decides.
      changes: what an island says of its own.
      microbatch_size: rows of a forward pass.
      num_microbatches: of a step of an island.
      num_sources: for which the loss function gives sums.
      spike_threshold: robust standard deviations above which a loss is a spike; None: none is.
      compilation: what XLA compiles of a micro-batch.
    """

    def __init__(
        self,
        loss_function: LossFunction,
        optimizer: Optimizer,
        update: Update,
        changes: Changes,
        microbatch_size: int,
        num_microbatches: int,
        num_sources: int,
        spike_threshold: float | None,
        compilation: Compilation,
    ) -> None:
        self._loss_function, self._weights = loss_function, optimizer.weights
        self._update, self._changes = update, changes
        self._microbatch_size, self._num_microbatches = microbatch_size, num_microbatches
        self._statistics_size, self._spike_threshold = StepStatistics.size(num_sources), spike_threshold
        alone = {"_noinline": True}
        self._microbatch = tf.function(
            self._microbatch_sums, jit_compile=compilation.whole, autograph=False, experimental_attributes=alone
        )
        # traced once, however many islands a replica carries
        self._traced = tf.function(self._round, autograph=False, experimental_attributes=alone)

    def round(self, weights: Sequence[tf.Tensor], state: IslandState, rows: Rows, first_step: tf.Tensor) -> Round:
        """Steps on `rows`, one after the other; an update that is refused is left out.

        Args:
          weights: that all islands start from, in the order of the optimizer's.
          state: of this island.
          rows: of every step, (steps, rows of an island, ...) each.
          first_step: int64 scalar, the number of updates before the round.
        """
        found: Round = self._traced(list(weights), state, dict(rows), first_step)
        return found

    def _round(self, weights: Tensors, state: IslandState, rows: Rows, first_step: tf.Tensor) -> Round:
        num_steps = tf.shape(rows["tokens"])[0]
        found = tf.TensorArray(tf.float32, num_steps, element_shape=(self._statistics_size,))

        def one_step(
            count: tf.Tensor, weights: Tensors, state: IslandState, found: tf.TensorArray
        ) -> tuple[tf.Tensor, Tensors, IslandState, tf.TensorArray]:
            of_step = {key: value[count] for key, value in rows.items()}
            weights, state, statistics = self._step(weights, state, of_step, first_step + tf.cast(count, tf.int64))
            return count + 1, weights, state, found.write(count, statistics)

        _, ended, state, found = tf.while_loop(
            lambda count, *_: count < num_steps,
            one_step,
            (tf.constant(0), weights, state, found),
            parallel_iterations=1,
        )
        statistics = found.stack()
        each = StepStatistics.from_vector(statistics)
        tokens = tf.reduce_sum(tf.where(each.was_applied, each.num_tokens, 0.0))
        message, errors = self._changes.message(weights, ended, state.errors, tokens)
        return Round(message, state._replace(errors=list(errors)), tokens, statistics)

    def _step(
        self, weights: Tensors, state: IslandState, rows: Rows, step: tf.Tensor
    ) -> tuple[Tensors, IslandState, tf.Tensor]:
        microbatch = pipeline.rows_of(rows, self._microbatch_size)
        gradients, sums = tree_sum(
            lambda index: self._microbatch(weights, microbatch(index), step), self._num_microbatches
        )
        limit = spikes.loss_limit(state.recent_losses, self._spike_threshold)
        weights, optimizer, statistics = self._update.values(
            weights, state.optimizer, gradients, tf.unstack(sums), step, limit
        )
        found = StepStatistics.from_vector(statistics)
        moved_on = tf.concat([state.recent_losses[1:], found.loss[tf.newaxis]], axis=0)
        recent = tf.where(found.was_applied, moved_on, state.recent_losses)
        return weights, state._replace(optimizer=optimizer, recent_losses=recent), statistics

    def _microbatch_sums(self, weights: Tensors, rows: Rows, step: tf.Tensor) -> tuple[Tensors, tf.Tensor]:
        """Gradients of the sum of losses; and the sums and the counts of each source, (2, num_sources)."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            # the model computes with these tensors in the place of its variables
            with keras.StatelessScope(state_mapping=list(zip(self._weights, weights, strict=True))):
                loss_sums, counts = self._loss_function(rows, step)
        found = tape.gradient(loss_sums, weights, None, tf.UnconnectedGradients.ZERO)
        return [tf.convert_to_tensor(gradient) for gradient in found], tf.stack([loss_sums, counts])

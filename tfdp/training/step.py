"""One optimizer step: accumulate -> reduce -> divide -> clip -> apply.

A replica sums, over its micro-batches, the gradient of the summed token losses, that sum, and the number of
valid tokens. All of it is summed over the replicas in one reduction per step, whatever the accumulation. Only then is
anything divided (by the global token count), measured (the global norm), clipped and applied, by every replica to its
own copy of the weights: the same arithmetic on the same numbers, so the copies stay equal.

Keras and `tf.distribute` would do otherwise: a mean per replica, a clip per replica, a second sum inside the
optimizer. Nothing here knows of files, models or metrics; a task enters as a function from rows to sums.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfdp.data import pipeline
from tfdp.ops.sums import running_sum, tree_sum
from tfdp.optim.average import WeightAverage
from tfdp.optim.optimizer import Optimizer
from tfdp.optim.schedule import Schedule
from tfdp.parallel import collectives, consistency
from tfdp.parallel.batch_layout import BatchLayout
from tfdp.parallel.buckets import Packed
from tfdp.parallel.consistency import Disagreement
from tfdp.parallel.synchronizer import AllReduce, Synchronizer
from tfdp.tasks.task import LossFunction, Rows
from tfdp.training import loss_scale, spikes
from tfdp.training.clock import PHASES, after, clock
from tfdp.training.compilation import Compilation
from tfdp.training.ledger import Spike
from tfdp.training.requests import Requests
from tfdp.training.step_statistics import StepResults, StepStatistics
from tfdp.training.update import Update

UPDATE_GROUPS = 4  # of weights on CPUs, which several cores update at the same time


@dataclass(frozen=True)
class StepRules:
    """How a step sums, and which updates it refuses; the defaults refuse nothing but what is not finite.

    Attributes:
      clip_norm: largest global norm of the mean gradient; None: no clipping.
      reduction: fast or canonical, the order in which the micro-batches of a replica are summed.
      verify_every: steps between two comparisons of what all replicas hold; 0: never.
      spike_threshold: robust standard deviations above which a loss is a spike; None: none is.
      skip_spikes: whether to go on after a spike, without its update, instead of ending the call.
      scales_loss: whether gradients are those of a scaled loss, as float16 needs; see `loss_scale`.
    """

    clip_norm: float | None = None
    reduction: str = "fast"
    verify_every: int = 0
    spike_threshold: float | None = None
    skip_spikes: bool = False
    scales_loss: bool = False


class _Outcome(NamedTuple):
    """What one step came to on a replica; but for the seconds the same on all that update together."""

    statistics: tf.Tensor  # the vector of `StepStatistics`
    digests: tf.Tensor  # of what all replicas hold, at the steps that compare it
    stop_requests: tf.Tensor  # see `Requests`
    seconds: tf.Tensor  # of `PHASES`


class _Loop(NamedTuple):
    """Where the loop over steps stands."""

    count: tf.Tensor  # steps done
    recent_losses: tf.Tensor  # the window that spikes are judged by
    digests: tf.Tensor  # of the last step, as are the two below
    stop_requests: tf.Tensor
    goes_on: tf.Tensor  # whether that step was done
    seconds: tf.Tensor  # of `PHASES`, over all steps
    scaling: tf.Tensor  # of the loss, see `loss_scale`
    rows: tf.TensorArray  # the statistics of each step


class TrainStep:
    """Runs optimizer steps; make it inside or outside the scope, once per run.

    Args:
      strategy: that the weights were made under.
      loss_function: sums and counts over the rows of one micro-batch.
      optimizer: with the weights.
      schedule: the learning rate by step.
      layout: how the global batch is cut.
      rules: how to sum, and what to refuse.
      compilation: what XLA compiles; or whether it compiles micro-batch and update.
      num_sources: for which the loss function gives sums.
      synchronizer: how replicas stay one model; None: `AllReduce` of these weights.
      average: of the weights, updated after them; None: there is none.

    Attributes:
      recent_losses: of the last steps, the window that spikes are judged by.
      scaling: of the loss, see `loss_scale`.
      reduction_bytes: that each replica hands to the reduction of a step.
      num_reductions: packs of that reduction; over plain TCP, 1.
    """

    phases: tuple[str, ...] = PHASES

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        loss_function: LossFunction,
        optimizer: Optimizer,
        schedule: Schedule,
        layout: BatchLayout,
        rules: StepRules,
        compilation: Compilation | bool,
        num_sources: int = 1,
        synchronizer: Synchronizer | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        self._strategy, self._optimizer = strategy, optimizer
        self._loss_function, self._rules = loss_function, rules
        num_replicas = int(strategy.num_replicas_in_sync)
        self._num_sources = num_sources
        self._verifies = rules.verify_every > 0 and num_replicas > 1
        state = [*optimizer.state, *(average.variables if average is not None else ())]
        self._synchronizer = synchronizer or AllReduce(strategy, optimizer.weights, state, rules.reduction)
        self._digests_shape = (num_replicas, len(self._synchronizer.shared), 2) if self._verifies else (0,)
        self._sums = Packed([(num_sources,), (num_sources,), (), self._digests_shape])
        self.reduction_bytes: float = self._synchronizer.reduction_bytes(self._sums.size)
        self.num_reductions: float = self._synchronizer.num_reductions
        self._layout = layout
        self._num_local_microbatches = layout.global_batch_size // (layout.microbatch_size * num_replicas)
        self._requests = Requests()
        # autograph=False: every loop and branch here is TensorFlow's own, and reading the source takes a second or two
        if isinstance(compilation, bool):
            compilation = Compilation(whole=compilation, kernels=False, update=compilation)
        # Canonical: a micro-batch stays a function of its own, so that the graph optimizer sees the same of it in
        # a loop or alone. (What XLA compiles is never inlined.)
        alone = {"_noinline": True} if rules.reduction == "canonical" else None
        self._microbatch = tf.function(
            self._microbatch_sums, jit_compile=compilation.whole, autograph=False, experimental_attributes=alone
        )
        # Canonical promises bits: XLA alone leaves the arithmetic of the update as it is, whatever surrounds it.
        compiled = compilation.update or rules.reduction == "canonical"
        num_groups = 1 if collectives.on_gpu(strategy) else UPDATE_GROUPS
        self._update = Update(optimizer, schedule, rules.clip_norm, compiled, num_groups, average)
        # integers: XLA gives the same bits everywhere
        self._digests = tf.function(self._own_digests, jit_compile=True, autograph=False)
        self._gather_digests = tf.function(
            lambda: strategy.run(lambda: collectives.replica_gather(self._digests())), autograph=False
        )
        self._run = tf.function(self._run_steps, autograph=False)
        self.load_state({})

    def collect(self) -> None:
        """Brings here what a checkpoint holds: every worker has it."""

    def boundary(self, step: int) -> int:
        """The first step from `step` on after which a run can be evaluated, saved and stopped: each can."""
        return step

    def metrics(self) -> dict[str, float | int]:
        """The scale of the loss and the overflows of the run so far, where it is scaled."""
        if not self._rules.scales_loss:
            return {}
        scale, _, num_overflows = self.scaling.tolist()
        return {"loss_scale": scale, "num_overflows": int(num_overflows)}

    def to_state(self) -> dict[str, Any]:
        """What a step knows of those before it, for a checkpoint."""
        state: dict[str, Any] = {"recent_losses": spikes.recent_to_state(self.recent_losses)}
        if self._rules.scales_loss:
            state["loss_scale"] = self.scaling.tolist()
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes that back from a checkpoint; what is missing there starts anew."""
        self.recent_losses = spikes.recent_from_state(state.get("recent_losses", []))
        self.scaling = loss_scale.from_state(state.get("loss_scale"), self._rules.scales_loss)

    def __call__(self, batches: Any, first_step: int, num_steps: int) -> StepResults:
        """Runs up to `num_steps` steps on the next batches.

        It ends early before an update that is refused, and after the step in which a stop request arrived.

        Args:
          batches: an iterator of `pipeline.train_batches`, standing at `first_step`.
          first_step: number of optimizer steps done before.
          num_steps: how many to run.
        """
        end: _Loop = self._run(
            batches,
            tf.constant(first_step, tf.int64),
            tf.constant(num_steps, tf.int32),
            tf.constant(self.recent_losses),
            tf.constant(self.scaling),
        )
        self.recent_losses, self.scaling = np.asarray(end.recent_losses), np.asarray(end.scaling)
        done, rows = int(end.count), np.asarray(end.rows)
        each = StepStatistics.from_vector(rows[:done])
        skipped = [
            self._spike(rows[index], first_step + index + 1) for index in range(done) if not each.was_applied[index]
        ]
        spike = disagreement = None
        if not bool(end.goes_on) and not bool(consistency.agree(end.digests)):
            disagreement = self._disagreement(end.digests)
        elif not bool(end.goes_on):
            spike = self._spike(rows[done], first_step + done + 1)
        return StepResults(
            each.loss,
            each.grad_norm,
            each.learning_rate,
            each.num_tokens.astype(np.int64),
            each.source_losses,
            each.source_tokens.astype(np.int64),
            skipped,
            spike,
            disagreement,
            stopped=float(end.stop_requests) >= 1,
            time_is_up=0 < float(end.stop_requests) < 1,
            seconds=np.asarray(end.seconds),
        )

    def verify(self, step: int) -> Disagreement | None:
        """Compares what the replicas hold before a step, in a small reduction of its own that all workers must enter.

        None too where they need not hold the same then.
        """
        if not self._verifies or not self._synchronizer.agree_before(step):
            return None
        digests = collectives.first_replica(self._strategy, self._gather_digests())
        return None if bool(consistency.agree(digests)) else self._disagreement(digests)

    def _disagreement(self, digests: tf.Tensor) -> Disagreement:
        return consistency.find_disagreement(digests.numpy(), [variable.path for variable in self._synchronizer.shared])

    def request_stop(self) -> None:
        """Ends the running call after its current step, on every worker after the same one; from any thread."""
        self._requests.stop()

    def request_end(self) -> None:
        """The same, but the run has reached its end; on the chief alone, once. A stop request on any worker wins."""
        self._requests.end()

    def last_comparison(self, first_step: int, num_steps: int) -> int | None:
        """The last of some steps before which the replicas compared what they hold; None: before none of them."""
        every = self._rules.verify_every
        compared = (
            step
            for step in range(first_step + num_steps - 1, first_step - 1, -1)
            if every and step % every == 0 and self._synchronizer.agree_before(step)
        )
        return next(compared, None)

    def _spike(self, row: np.ndarray, step: int) -> Spike:
        found = StepStatistics.from_vector(row)
        names = [*(weight.path for weight in self._optimizer.weights), "loss", None]
        return Spike(step, float(found.loss), float(found.grad_norm), float(found.limit), names[int(found.refused)])

    def _run_steps(
        self, batches: Any, first_step: tf.Tensor, num_steps: tf.Tensor, recent_losses: tf.Tensor, scaling: tf.Tensor
    ) -> "_Loop":
        """Several steps in one graph, so that a short step does not wait for Python.

        Returns:
          How the loop ended, with a row of statistics for each step, one more if the last was refused.
        """

        def continues(loop: _Loop) -> tf.Tensor:
            return (loop.count < num_steps) & (loop.stop_requests <= 0) & loop.goes_on

        def one_step(loop: _Loop) -> tuple[_Loop]:
            step = first_step + tf.cast(loop.count, tf.int64)
            limit = spikes.loss_limit(loop.recent_losses, self._rules.spike_threshold)
            found, scaling = self._one_step(next(batches), step, limit, clock(loop.count), loop.scaling)
            statistics = StepStatistics.from_vector(found.statistics)
            goes_on = consistency.agree(found.digests) & (statistics.was_applied | self._rules.skip_spikes)
            moved_on = tf.concat([loop.recent_losses[1:], statistics.loss[tf.newaxis]], axis=0)
            return (
                _Loop(
                    count=loop.count + tf.cast(goes_on, tf.int32),
                    recent_losses=tf.where(goes_on & statistics.was_applied, moved_on, loop.recent_losses),
                    digests=found.digests,
                    stop_requests=found.stop_requests,
                    goes_on=goes_on,
                    seconds=loop.seconds + found.seconds,
                    scaling=scaling,
                    rows=loop.rows.write(loop.count, found.statistics),
                ),
            )

        size = StepStatistics.size(self._num_sources)
        start = _Loop(
            count=tf.constant(0),
            recent_losses=recent_losses,
            digests=tf.zeros(self._digests_shape),
            stop_requests=tf.constant(0.0),
            goes_on=tf.constant(True),
            seconds=tf.zeros([len(PHASES)], tf.float64),
            scaling=scaling,
            rows=tf.TensorArray(tf.float32, num_steps, element_shape=(size,), clear_after_read=False),
        )
        (end,) = tf.while_loop(continues, one_step, (start,), parallel_iterations=1)
        return end._replace(rows=end.rows.stack())

    def _one_step(
        self, batch: Any, step: tf.Tensor, limit: tf.Tensor, begun: tf.Tensor, scaling: tf.Tensor
    ) -> tuple["_Outcome", tf.Tensor]:
        """One step on all replicas, repeated at half the loss scale as long as its gradient overflows.

        Returns:
          What it came to on the first replica, and the scaling of the next step.
        """

        def attempt(begun: tf.Tensor, scaling: tf.Tensor) -> _Outcome:
            per_replica = self._strategy.run(self._replica_step, args=(batch, step, limit, begun, scaling[0]))
            return _Outcome(*collectives.first_replica(self._strategy, per_replica))

        if not self._rules.scales_loss:
            return attempt(begun, scaling), scaling

        def overflowed(found: _Outcome) -> tf.Tensor:
            return loss_scale.overflowed(StepStatistics.from_vector(found.statistics), len(self._optimizer.weights))

        def goes_on(found: _Outcome, scaling: tf.Tensor, _begun: tf.Tensor) -> tf.Tensor:
            return overflowed(found) & (scaling[0] > loss_scale.LEAST)

        def again(before: _Outcome, scaling: tf.Tensor, begun: tf.Tensor) -> tuple[_Outcome, tf.Tensor, tf.Tensor]:
            found = attempt(begun, scaling)
            scaling = tf.where(overflowed(found), loss_scale.after_overflow(scaling), scaling)
            return found._replace(seconds=before.seconds + found.seconds), scaling, clock(found.statistics)

        none_yet = _Outcome(  # which reads as an overflow: it is tried once at least
            statistics=tf.zeros([StepStatistics.size(self._num_sources)]),
            digests=tf.zeros(self._digests_shape),
            stop_requests=tf.constant(0.0),
            seconds=tf.zeros([len(PHASES)], tf.float64),
        )
        found, scaled, _ = tf.while_loop(goes_on, again, (none_yet, scaling, begun), parallel_iterations=1)
        applied = StepStatistics.from_vector(found.statistics).was_applied
        helped = tf.where(applied, loss_scale.after_step(scaled), scaled)
        return found, tf.where(overflowed(found), scaling, helped)

    def _replica_step(
        self, batch: Rows, step: tf.Tensor, limit: tf.Tensor, begun: tf.Tensor, scale: tf.Tensor
    ) -> "_Outcome":
        arrived = clock(batch["tokens"])
        batch = {key: after(arrived, value) for key, value in batch.items()}
        summed = tree_sum if self._rules.reduction == "canonical" else running_sum
        rows = pipeline.rows_of(batch, self._layout.microbatch_size)
        gradients, sums = summed(
            lambda index: self._microbatch(rows(index), step, scale),
            self._num_local_microbatches,
            self._layout.parallel_microbatches,
        )
        computed = clock(sums, *gradients)
        sums = after(computed, sums)
        sums = Packed.pack([sums, self._requests.value(), self._digest_slots(step)])
        gradients, sums = self._synchronizer.reduce(gradients, sums)
        reduced = clock(sums, *gradients)
        loss_sums, counts, stop_requests, digests = self._sums.unpack(after(reduced, sums))
        agreed = consistency.agree(digests)
        statistics, written = self._update(gradients, (loss_sums, counts), agreed, step, limit, scale)
        written = self._synchronizer.after_step(step, written)
        times = [begun, arrived, computed, reduced, clock(statistics, written)]
        seconds = tf.stack([later - earlier for earlier, later in pairwise(times)])
        return _Outcome(statistics, digests, stop_requests, seconds)

    def _digest_slots(self, step: tf.Tensor) -> tf.Tensor:
        """The digests of what this replica holds in its slot, at the steps that verify; zeros at the others."""
        if not self._verifies:
            return tf.zeros(self._digests_shape)
        return tf.cond(
            (step % self._rules.verify_every == 0) & self._synchronizer.agree_before(step),
            lambda: collectives.replica_slots(self._digests()),
            lambda: tf.zeros(self._digests_shape),
        )

    def _own_digests(self) -> tf.Tensor:
        return consistency.digests([tf.convert_to_tensor(variable.value) for variable in self._synchronizer.shared])

    def _microbatch_sums(self, rows: Rows, step: tf.Tensor, scale: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Gradients of the scaled sum of losses; and the sums and the counts of each source, (2, num_sources)."""
        weights = [weight.value for weight in self._optimizer.weights]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            loss_sums, counts = self._loss_function(rows, step)
        upstream = tf.fill(loss_sums.shape, scale) if self._rules.scales_loss else None
        found = tape.gradient(loss_sums, weights, upstream, tf.UnconnectedGradients.ZERO)
        gradients = [tf.convert_to_tensor(gradient) for gradient in found]
        if self._num_local_microbatches == 1:  # nothing is added to them here: half the bytes where they are bfloat16
            gradients = [_before_cast(gradient) for gradient in gradients]
        return gradients, tf.stack([loss_sums, counts])


def _before_cast(gradient: tf.Tensor) -> tf.Tensor:
    """The gradient as the backward pass computed it, where that was widened to float32 last: the same numbers."""
    if gradient.op.type == "Cast" and gradient.op.inputs[0].dtype in (tf.bfloat16, tf.float16):
        return gradient.op.inputs[0]
    return gradient

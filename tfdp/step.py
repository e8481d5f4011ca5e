"""One optimizer step: accumulate -> reduce -> divide -> clip -> apply.

A replica sums, over its micro-batches, the gradient of the summed token losses, that sum, and the number of
valid tokens. All of it is summed over the replicas in one reduction per step, whatever the accumulation. Only then is
anything divided (by the global token count), measured (the global norm), clipped and applied, by every replica to its
own copy of the weights: the same arithmetic on the same numbers, so the copies stay equal.

Keras and `tf.distribute` would do otherwise: a mean per replica, a clip per replica, a second sum inside the
optimizer. Nothing here knows of files, models or metrics; a task enters as a function from rows to sums.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import tensorflow as tf

from tfdp import distribution, loss_scale, sentinel, spikes
from tfdp.buckets import Buckets
from tfdp.data import Batch
from tfdp.ledger import Spike
from tfdp.losses import LossFunction
from tfdp.optimizer import Optimizer, Schedule
from tfdp.sentinel import Disagreement
from tfdp.sums import running_sum, tree_sum
from tfdp.update import NUM_TOLD, Packed, Update

LARGE_MATRIX = 500_000  # numbers, from which on oneDNN multiplies faster in float32 than XLA's CPU backend
UPDATE_GROUPS = 4  # of weights on CPUs, which several cores update at the same time
PARTS = ("input", "forward_backward", "reduction", "optimizer")  # of a step's time


@dataclass(frozen=True)
class StepRules:
    """How a step sums, and which updates it refuses; the defaults refuse nothing but what is not finite.

    Attributes:
      clip_norm: largest global norm of the mean gradient; None: no clipping.
      reduction: fast or canonical, the order of the sums.
      verify_every: steps between two comparisons of what all replicas hold; 0: never.
      spike_threshold: robust standard deviations above which a loss is a spike; None: none is.
      skip_spikes: whether to go on after a spike, without its update, instead of ending the call.
      wire_dtype: float32 or bfloat16, in which gradients travel; what is told of a step always travels in float32.
      bytes_per_pack: of a reduction; None: what suits the devices.
      scales_loss: whether gradients are those of a scaled loss, as float16 needs; see `loss_scale`.
    """

    clip_norm: float | None = None
    reduction: str = "fast"
    verify_every: int = 0
    spike_threshold: float | None = None
    skip_spikes: bool = False
    wire_dtype: str = "float32"
    bytes_per_pack: int | None = None
    scales_loss: bool = False


@dataclass(frozen=True)
class Compilation:
    """What XLA compiles.

    Attributes:
      whole: the whole micro-batch.
      parts: what lies between its matrix products, each part by itself.
      update: the update of the weights.
    """

    whole: bool
    parts: bool
    update: bool

    @classmethod
    def choose(cls, choice: bool | str, precision: str, on_gpu: bool, largest: int) -> "Compilation":
        """Resolves `training.jit_compile`: auto is the whole, but on CPUs the parts where oneDNN's products are faster.

        They are in bfloat16, which XLA's CPU backend computes as float32, and in float32 where matrices are large.
        `largest` is how many numbers the largest matrix has.
        """
        if choice != "auto":
            return cls(whole=bool(choice), parts=False, update=bool(choice))
        whole = on_gpu or (precision == "float32" and largest < LARGE_MATRIX)
        return cls(whole=whole, parts=not whole, update=True)

    def __str__(self) -> str:
        return "XLA" if self.whole else "XLA between the products" if self.parts else "no XLA"


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
    seconds: np.ndarray  # of `PARTS`, over all steps that were begun; waiting for other replicas is reduction


class TrainStep:
    """Runs optimizer steps; make it inside or outside the scope, once per run.

    Args:
      strategy: that the weights were made under.
      loss_function: sums and counts over the rows of one micro-batch.
      optimizer: with the weights.
      schedule: the learning rate by step.
      global_batch_size, microbatch_size: sequences per step, and per forward pass on one replica.
      rules: how to sum, and what to refuse.
      compilation: what XLA compiles; or whether it compiles micro-batch and update.
      num_sources: for which the loss function gives sums.
      num_side_by_side: micro-batches that a replica computes at the same time, each on cores of its own.

    Attributes:
      recent_losses: of the last steps, the window that spikes are judged by.
      scaling: of the loss, see `loss_scale`.
      reduction_bytes: that each replica hands to the reduction of a step.
      num_reductions: packs of that reduction; over plain TCP, 1.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        loss_function: LossFunction,
        optimizer: Optimizer,
        schedule: Schedule,
        global_batch_size: int,
        microbatch_size: int,
        rules: StepRules,
        compilation: Compilation | bool,
        num_sources: int = 1,
        num_side_by_side: int = 1,
    ) -> None:
        self._strategy, self._optimizer = strategy, optimizer
        self._loss_function, self._rules = loss_function, rules
        num_replicas = int(strategy.num_replicas_in_sync)
        self._verified = [*optimizer.weights, *optimizer.state]
        self._verifies = rules.verify_every > 0 and num_replicas > 1
        self._digests_shape = (num_replicas, len(self._verified), 2) if self._verifies else (0,)
        self._num_sources, self._row_shape = num_sources, (NUM_TOLD + 2 * num_sources,)
        packs_bytes = rules.bytes_per_pack
        if packs_bytes is None:
            packs_bytes = distribution.default_bytes_per_pack(strategy)
        shapes = [tuple(weight.shape) for weight in optimizer.weights]
        self._wire_dtype = tf.as_dtype(rules.wire_dtype)
        self._buckets = Buckets(shapes, packs_bytes, self._wire_dtype.size)
        self._told = Packed([(num_sources,), (num_sources,), (), self._digests_shape])
        self._reduces = num_replicas > 1
        num_numbers = sum(math.prod(shape) for shape in shapes)
        self.reduction_bytes = (num_numbers * self._wire_dtype.size + 4 * self._told.size) * self._reduces
        self.num_reductions = distribution.num_reductions(strategy, self._buckets.num_packs) * self._reduces
        self._microbatch_size = microbatch_size
        self._num_local_microbatches = global_batch_size // (microbatch_size * num_replicas)
        self._num_side_by_side = num_side_by_side
        self._stop_requested = tf.Variable(0.0, trainable=False, name="stop_requested")
        # autograph=False: every loop and branch here is TensorFlow's own, and reading the source takes a second or two
        if isinstance(compilation, bool):
            compilation = Compilation(whole=compilation, parts=False, update=compilation)
        # Canonical: a micro-batch stays a function of its own, so that the graph optimizer sees the same of it in
        # a loop or alone. (What XLA compiles is never inlined.)
        alone = {"_noinline": True} if rules.reduction == "canonical" else None
        self._microbatch = tf.function(
            self._microbatch_sums, jit_compile=compilation.whole, autograph=False, experimental_attributes=alone
        )
        # Canonical promises bits: XLA alone leaves the arithmetic of the update as it is, whatever surrounds it.
        compiled = compilation.update or rules.reduction == "canonical"
        num_groups = 1 if distribution.on_gpu(strategy) else UPDATE_GROUPS
        self._update = Update(optimizer, schedule, rules.clip_norm, compiled, num_groups)
        # integers: XLA gives the same bits everywhere
        self._digests = tf.function(self._own_digests, jit_compile=True, autograph=False)
        self._gather_digests = tf.function(
            lambda: strategy.run(lambda: distribution.replica_gather(self._digests())), autograph=False
        )
        self._run = tf.function(self._run_steps, autograph=False)
        self.load_state({})

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
          batches: an iterator of `data.train_batches`, standing at `first_step`.
          first_step: number of optimizer steps done before.
          num_steps: how many to run.
        """
        rows, count, recent, digests, stop, goes_on, seconds, scaling = self._run(
            batches,
            tf.constant(first_step, tf.int64),
            tf.constant(num_steps, tf.int32),
            tf.constant(self.recent_losses),
            tf.constant(self.scaling),
        )
        self.recent_losses, self.scaling = np.asarray(recent), np.asarray(scaling)
        done, rows = int(count), np.asarray(rows)
        loss, grad_norm, learning_rate, num_tokens, refused, _ = rows[:done, :NUM_TOLD].T
        source_losses, source_tokens = np.split(rows[:done, NUM_TOLD:], 2, axis=1)
        skipped = [self._spike(rows[index], first_step + index + 1) for index in range(done) if refused[index] >= 0]
        spike = disagreement = None
        if not bool(goes_on) and not bool(sentinel.agree(digests)):
            disagreement = self._disagreement(digests)
        elif not bool(goes_on):
            spike = self._spike(rows[done], first_step + done + 1)
        return StepResults(
            loss,
            grad_norm,
            learning_rate,
            num_tokens.astype(np.int64),
            source_losses,
            source_tokens.astype(np.int64),
            skipped,
            spike,
            disagreement,
            stopped=float(stop) > 0,
            seconds=np.asarray(seconds),
        )

    def verify(self) -> Disagreement | None:
        """Compares what the replicas hold now, in a small reduction of its own that all workers have to enter."""
        if not self._verifies:
            return None
        digests = distribution.first_replica(self._strategy, self._gather_digests())
        return None if bool(sentinel.agree(digests)) else self._disagreement(digests)

    def _disagreement(self, digests: tf.Tensor) -> Disagreement:
        return sentinel.find_disagreement(digests.numpy(), [variable.path for variable in self._verified])

    def request_stop(self) -> None:
        """Ends the running call after its current step, on every worker after the same one; from any thread."""
        self._stop_requested.assign(1.0)

    def _spike(self, row: np.ndarray, step: int) -> Spike:
        loss, grad_norm, _, _, refused, limit = (float(value) for value in row[:NUM_TOLD])
        names = [*(weight.path for weight in self._optimizer.weights), "loss", None]
        return Spike(step, loss, grad_norm, limit, names[int(refused)])

    def _run_steps(
        self, batches: Any, first_step: tf.Tensor, num_steps: tf.Tensor, recent: tf.Tensor, scaling: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        """Several steps in one graph, so that a short step does not wait for Python.

        Returns:
          A row of `Update` for each step, one more if the last was refused; the number of steps done; the window of
          recent losses; the digests of the last step; the number of stop requests; whether the last step was done;
          the seconds of `PARTS`; and the scaling of the loss.
        """

        def continues(
            count: tf.Tensor, _r: tf.Tensor, _d: tf.Tensor, stop: tf.Tensor, goes_on: tf.Tensor, *_: Any
        ) -> Any:
            return (count < num_steps) & (stop <= 0) & goes_on

        def one_step(
            count: tf.Tensor,
            recent: tf.Tensor,
            _d: tf.Tensor,
            _s: tf.Tensor,
            _g: tf.Tensor,
            seconds: tf.Tensor,
            scaling: tf.Tensor,
            rows: tf.TensorArray,
        ) -> tuple[tf.Tensor, ...]:
            step = first_step + tf.cast(count, tf.int64)
            limit = spikes.loss_limit(recent, self._rules.spike_threshold)
            row, digests, stop, parts, scaling = self._one_step(next(batches), step, limit, _clock(count), scaling)
            applied = row[4] < 0
            goes_on = sentinel.agree(digests) & (applied | self._rules.skip_spikes)
            recent = tf.where(goes_on & applied, tf.concat([recent[1:], row[:1]], axis=0), recent)
            done = count + tf.cast(goes_on, tf.int32)
            return done, recent, digests, stop, goes_on, seconds + parts, scaling, rows.write(count, row)

        rows = tf.TensorArray(tf.float32, num_steps, element_shape=self._row_shape, clear_after_read=False)
        start = (
            tf.constant(0),
            recent,
            tf.zeros(self._digests_shape),
            tf.constant(0.0),
            tf.constant(True),
            tf.zeros([len(PARTS)], tf.float64),
            scaling,
            rows,
        )
        count, recent, digests, stop, goes_on, seconds, scaling, rows = tf.while_loop(
            continues, one_step, start, parallel_iterations=1
        )
        return rows.stack(), count, recent, digests, stop, goes_on, seconds, scaling

    def _one_step(
        self, batch: Any, step: tf.Tensor, limit: tf.Tensor, begun: tf.Tensor, scaling: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        """One step on all replicas, repeated at half the loss scale as long as its gradient overflows.

        Returns:
          What `_replica_step` does, on the first replica; and the scaling of the next step.
        """

        def attempt(begun: tf.Tensor, scaling: tf.Tensor) -> tuple[tf.Tensor, ...]:
            per_replica = self._strategy.run(self._replica_step, args=(batch, step, limit, begun, scaling[0]))
            return tuple(distribution.first_replica(self._strategy, per_replica))

        if not self._rules.scales_loss:
            return *attempt(begun, scaling), scaling

        def overflowed(row: tf.Tensor) -> tf.Tensor:
            return loss_scale.overflowed(row[4], row[0], len(self._optimizer.weights))

        def goes_on(row: tf.Tensor, _d: tf.Tensor, _s: tf.Tensor, _p: Any, scaling: tf.Tensor, _: Any) -> tf.Tensor:
            return overflowed(row) & (scaling[0] > loss_scale.LEAST)

        def again(
            _r: tf.Tensor, _d: tf.Tensor, _s: tf.Tensor, seconds: tf.Tensor, scaling: tf.Tensor, begun: tf.Tensor
        ) -> tuple[tf.Tensor, ...]:
            row, digests, stop, parts = attempt(begun, scaling)
            scaling = tf.where(overflowed(row), loss_scale.after_overflow(scaling), scaling)
            return row, digests, stop, seconds + parts, scaling, _clock(row)

        none_yet = tf.zeros(self._row_shape)  # which reads as an overflow: it is tried once at least
        start = (none_yet, tf.zeros(self._digests_shape), 0.0, tf.zeros([len(PARTS)], tf.float64), scaling, begun)
        row, digests, stop, seconds, scaled, _ = tf.while_loop(goes_on, again, start, parallel_iterations=1)
        helped = tf.where(row[4] < 0, loss_scale.after_step(scaled), scaled)
        return row, digests, stop, seconds, tf.where(overflowed(row), scaling, helped)

    def _replica_step(
        self, batch: Batch, step: tf.Tensor, limit: tf.Tensor, begun: tf.Tensor, scale: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        arrived = _clock(batch["tokens"])
        batch = {key: _after(arrived, value) for key, value in batch.items()}
        summed = tree_sum if self._rules.reduction == "canonical" else running_sum
        rows = _rows_of(batch, self._microbatch_size)
        gradients, sums = summed(
            lambda index: self._microbatch(rows(index), step, scale),
            self._num_local_microbatches,
            self._num_side_by_side,
        )
        computed = _clock(sums, *gradients)
        sums = _after(computed, sums)
        told = Packed.pack([sums, self._stop_requested.read_value(), self._digest_slots(step)])
        if self._reduces:
            packs = self._buckets.pack([tf.cast(gradient, self._wire_dtype) for gradient in gradients])
            packs, told = distribution.sum_step(packs, told, self._rules.reduction)
            gradients = self._buckets.unpack(packs)
        reduced = _clock(told, *gradients)
        loss_sums, counts, stop, digests = self._told.unpack(_after(reduced, told))
        agreed = sentinel.agree(digests)
        row, written = self._update(gradients, (loss_sums, counts), agreed, step, limit, scale)
        times = [begun, arrived, computed, reduced, _clock(row, written)]
        return row, digests, stop, tf.stack([after - before for before, after in pairwise(times)])

    def _digest_slots(self, step: tf.Tensor) -> tf.Tensor:
        """The digests of what this replica holds in its slot, at the steps that verify; zeros at the others."""
        if not self._verifies:
            return tf.zeros(self._digests_shape)
        return tf.cond(
            step % self._rules.verify_every == 0,
            lambda: distribution.replica_slots(self._digests()),
            lambda: tf.zeros(self._digests_shape),
        )

    def _own_digests(self) -> tf.Tensor:
        return sentinel.digests([tf.convert_to_tensor(variable.value) for variable in self._verified])

    def _microbatch_sums(self, rows: Batch, step: tf.Tensor, scale: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
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


class EvalStep:
    """Sums losses and counts over the batches of a split, without touching anything.

    Args:
      strategy, loss_function: as those of the train step.
      jit_compile: whether XLA compiles a forward pass.
      num_sources: for which the loss function gives sums.
      rows: sequences of one forward pass; a replica computes those of its rows side by side. None: all in one.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        loss_function: LossFunction,
        jit_compile: bool,
        num_sources: int = 1,
        rows: int | None = None,
    ) -> None:
        self._strategy, self._loss_function, self._num_sources, self._rows = strategy, loss_function, num_sources, rows
        self._replica = tf.function(self._replica_sums, jit_compile=jit_compile, autograph=False)
        self._run = tf.function(self._run_batches, autograph=False)

    def __call__(self, batches: Any, num_batches: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the sum of the losses in nats and the number of valid tokens of each source, over all replicas.

        The sums of each forward pass are added in float64 one by one, in the order of the sequences: the bits do not
        depend on the number of replicas, as long as each pass has the same number of rows.
        """
        loss_sums, counts = self._run(batches, tf.constant(num_batches)).numpy()
        return loss_sums, counts.astype(np.int64)

    def _run_batches(self, batches: Any, num_batches: tf.Tensor) -> tf.Tensor:
        def add(index: tf.Tensor, totals: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            per_replica = self._strategy.run(self._gathered, args=(next(batches),))
            passes = tf.reshape(distribution.first_replica(self._strategy, per_replica), [-1, 2, self._num_sources])
            for sums in tf.unstack(passes):
                totals += tf.cast(sums, tf.float64)
            return index + 1, totals

        start = (tf.constant(0), tf.zeros([2, self._num_sources], tf.float64))
        _, totals = tf.while_loop(lambda index, _: index < num_batches, add, start, parallel_iterations=1)
        return totals

    def _gathered(self, batch: Batch) -> tf.Tensor:
        size = batch["tokens"].shape[0]
        rows = _rows_of(batch, self._rows or size)
        passes = [self._replica(rows(index)) for index in range(size // (self._rows or size))]
        return distribution.replica_gather(tf.stack(passes))

    def _replica_sums(self, batch: Batch) -> tf.Tensor:
        sums = self._loss_function(batch, tf.constant(0, tf.int64))
        return tf.stack([tf.reshape(each, [self._num_sources]) for each in sums])


class RowLosses:
    """The loss of each sequence of a global batch, as a train step would see it; updates nothing.

    Args:
      strategy, microbatch_size, jit_compile: those of the train step.
      row_losses: sums and counts for each row of one micro-batch.
    """

    def __init__(
        self, strategy: tf.distribute.Strategy, row_losses: LossFunction, microbatch_size: int, jit_compile: bool
    ) -> None:
        self._strategy, self._row_losses, self._microbatch_size = strategy, row_losses, microbatch_size
        self._microbatch = tf.function(self._microbatch_rows, jit_compile=jit_compile, autograph=False)
        self._run = tf.function(lambda batch, step: strategy.run(self._gathered, args=(batch, step)), autograph=False)

    def __call__(self, batches: Any, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Sums of losses in nats and numbers of valid tokens, (global_batch_size,) each, in the order of positions."""
        per_replica = self._run(next(batches), tf.constant(step, tf.int64))
        rows = np.asarray(distribution.first_replica(self._strategy, per_replica)).reshape(-1, 2)
        return rows[:, 0], rows[:, 1].astype(np.int64)

    def _gathered(self, batch: Batch, step: tf.Tensor) -> tf.Tensor:
        rows, size = _rows_of(batch, self._microbatch_size), batch["tokens"].shape[0]
        parts = [self._microbatch(rows(index), step) for index in range(size // self._microbatch_size)]
        return distribution.replica_gather(tf.concat(parts, axis=0))

    def _microbatch_rows(self, rows: Batch, step: tf.Tensor) -> tf.Tensor:
        sums, counts = self._row_losses(rows, step)
        return tf.stack([tf.cast(sums, tf.float32), counts], axis=1)


def _rows_of(batch: Batch, size: int) -> Callable[[int | tf.Tensor], Batch]:
    """The rows of this replica's micro-batches, by index."""

    def rows(index: int | tf.Tensor) -> Batch:
        return {
            key: tf.ensure_shape(value[index * size : (index + 1) * size], [size, *value.shape[1:]])
            for key, value in batch.items()
        }

    return rows


def _clock(*tensors: tf.Tensor) -> tf.Tensor:
    """The time in seconds since the epoch, float64, at which the tensors are there; inside a graph.

    One number of each is added up, because TensorFlow lets go of a mere dependency when it inlines a function; and on a
    GPU, which runs behind the host, fetching the sum waits for the work.

    Only the first replica of a process has a clock, the others get 0 at once: TensorFlow runs all readings of a graph
    one after the other, in the order of its replicas, and what waits for them with them.
    """
    if distribution.is_first_replica():
        one_of_each = [tf.cast(tf.reshape(tensor, [-1])[0], tf.float32) for tensor in tensors]
        with tf.device("CPU:0"), tf.control_dependencies([tf.reduce_sum(tf.stack(one_of_each))]):
            return tf.timestamp()
    return tf.zeros([], tf.float64)


def _after(clock: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """The value, once the clock has been read: what comes next does not overtake it."""
    with tf.control_dependencies([clock]):
        return tf.identity(value)


def _before_cast(gradient: tf.Tensor) -> tf.Tensor:
    """The gradient as the backward pass computed it, where that was widened to float32 last: the same numbers."""
    if gradient.op.type == "Cast" and gradient.op.inputs[0].dtype in (tf.bfloat16, tf.float16):
        return gradient.op.inputs[0]
    return gradient

"""A pass over whole validation sets: each token exactly once, on any number of replicas."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow as tf

from tfdp.data import pipeline
from tfdp.data.sequences import Sequences
from tfdp.parallel import collectives
from tfdp.tasks.task import Exhibit, LossFunction, Metric, Output, Rows, Task, exhibits, named_metrics, num_statistics


@dataclass(frozen=True)
class ValidationSet:
    """Text that nothing is learned from."""

    name: str
    sequences: Sequences
    num_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """The result of a pass."""

    metrics: Mapping[str, Metric]  # that the task names, over all sets
    num_tokens: int
    sets: Mapping[str, "Evaluation"]  # each by its name, where there are several
    exhibits: Mapping[str, Exhibit] = field(default_factory=dict)  # what the task shows beside them

    def recorded(self) -> dict[str, float]:
        """The metrics that rows and summaries hold."""
        return {name: metric.value for name, metric in self.metrics.items() if metric.is_recorded}


class Evaluator:
    """Evaluates validation sets each time it is called.

    Args:
      strategy: that the model was made under.
      task: names the metrics.
      sums: of rows, by set, see `task.evaluation_sums`.
      sets: the validation sets.
      rows: sequences per forward pass on each replica.
      jit_compile: whether XLA compiles the forward pass.
      parallel_passes: forward passes that a replica computes at the same time.
      outputs: write what the model makes of the examples of each set, by its name; none for a task without `decoding`.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        task: Task,
        sums: Callable[[Rows], tf.Tensor],
        sets: Sequence[ValidationSet],
        rows: int,
        jit_compile: bool,
        parallel_passes: int = 1,
        outputs: Mapping[str, Callable[[], list[Output]]] = MappingProxyType({}),
    ) -> None:
        self._outputs = outputs
        self._step = EvalStep(strategy, sums, jit_compile, len(sets), rows, num_statistics(task))
        self._strategy, self.task, self._sets = strategy, task, sets
        self._rows = rows * parallel_passes * int(strategy.num_replicas_in_sync)

    def __call__(self) -> Evaluation:
        sequences = [each.sequences for each in self._sets]
        batches, num_batches = pipeline.validation_batches(self._strategy, sequences, self._rows)
        sums, sizes = self._step(iter(batches), num_batches), [each.num_bytes for each in self._sets]
        outputs = {name: write() for name, write in self._outputs.items()}
        of_sets = zip(self._sets, sums.T, strict=True)
        found = {
            each.name: self._evaluation(of_set, each.num_bytes, outputs.get(each.name)) for each, of_set in of_sets
        }
        if len(found) == 1:
            return next(iter(found.values()))
        joined = [output for of_set in outputs.values() for output in of_set] if outputs else None
        return self._evaluation(sums.sum(axis=1), sum(sizes), joined, found)

    def _evaluation(
        self,
        sums: np.ndarray,
        num_bytes: int,
        outputs: list[Output] | None,
        sets: Mapping[str, Evaluation] = MappingProxyType({}),
    ) -> Evaluation:
        loss, count, *statistics = sums
        totals: dict[str, Any] = {"loss": float(loss), "targets": int(count), "bytes": int(num_bytes)}
        if statistics:
            totals["statistics"] = np.array(statistics)
        if outputs is not None:
            totals["outputs"] = outputs
        return Evaluation(named_metrics(self.task, totals), int(count), sets, exhibits(self.task, totals))


class EvalStep:
    """Adds up losses, counts and what else a task counts over the batches of a split; updates nothing.

    Args:
      strategy: that of the train step.
      sums: of rows, float32 (2 + num_statistics, num_sources), see `task.evaluation_sums`.
      jit_compile: whether XLA compiles a forward pass.
      num_sources, num_statistics: see sums.
      rows: sequences of one forward pass; a replica computes its passes in parallel. None: all rows in one.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        sums: Callable[[Rows], tf.Tensor],
        jit_compile: bool,
        num_sources: int = 1,
        rows: int | None = None,
        num_statistics: int = 0,
    ) -> None:
        self._strategy, self._shape, self._rows = strategy, [2 + num_statistics, num_sources], rows
        self._replica = tf.function(sums, jit_compile=jit_compile, autograph=False)
        self._run = tf.function(self._run_batches, autograph=False)

    def __call__(self, batches: Any, num_batches: int) -> np.ndarray:
        """Returns the sums over all replicas, float64 (2 + num_statistics, num_sources): nats, valid tokens, and more.

        The sums of each forward pass are added in float64 one by one, in the order of the sequences: the bits do not
        depend on the number of replicas, as long as each pass has the same number of rows.
        """
        return np.asarray(self._run(batches, tf.constant(num_batches)))

    def _run_batches(self, batches: Any, num_batches: tf.Tensor) -> tf.Tensor:
        def add(index: tf.Tensor, totals: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            per_replica = self._strategy.run(self._gathered, args=(next(batches),))
            passes = tf.reshape(collectives.first_replica(self._strategy, per_replica), [-1, *self._shape])
            for sums in tf.unstack(passes):
                totals += tf.cast(sums, tf.float64)
            return index + 1, totals

        start = (tf.constant(0), tf.zeros(self._shape, tf.float64))
        _, totals = tf.while_loop(lambda index, _: index < num_batches, add, start, parallel_iterations=1)
        return totals

    def _gathered(self, batch: Rows) -> tf.Tensor:
        size = batch["tokens"].shape[0]
        rows = pipeline.rows_of(batch, self._rows or size)
        passes = [self._replica(rows(index)) for index in range(size // (self._rows or size))]
        return collectives.replica_gather(tf.stack(passes))


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
        rows = np.asarray(collectives.first_replica(self._strategy, per_replica)).reshape(-1, 2)
        return rows[:, 0], rows[:, 1].astype(np.int64)

    def _gathered(self, batch: Rows, step: tf.Tensor) -> tf.Tensor:
        rows, size = pipeline.rows_of(batch, self._microbatch_size), batch["tokens"].shape[0]
        parts = [self._microbatch(rows(index), step) for index in range(size // self._microbatch_size)]
        return collectives.replica_gather(tf.concat(parts, axis=0))

    def _microbatch_rows(self, rows: Rows, step: tf.Tensor) -> tf.Tensor:
        sums, counts = self._row_losses(rows, step)
        return tf.stack([tf.cast(sums, tf.float32), counts], axis=1)

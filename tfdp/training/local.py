"""Local steps: islands learn apart from one another for a round of steps, then become one model again.

In a round each of K islands starts from the same outer weights and takes H optimizer steps on its own rows
(`island.py`). Their changes come together once (`changes.py`), weighted by the tokens that were learned from, and the
outer optimizer (`optim/outer.py`) makes the next outer weights of them. The model's own variables hold the outer
weights: they are what is evaluated, sampled and exported. Between two rounds there is nothing else but the state of the
outer optimizer and that of each island, so that is where a run is saved, stopped and resumed.

K is a number of the configuration. A replica carries K / R islands, and their sum is a tree over the islands, so the
bits of a run do not depend on the number of its replicas and workers.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfdp.data import pipeline
from tfdp.ops.sums import fixed_sum
from tfdp.optim.optimizer import Optimizer
from tfdp.optim.outer import OuterOptimizer
from tfdp.parallel import collectives, consistency
from tfdp.parallel.buckets import Packed
from tfdp.parallel.consistency import Disagreement
from tfdp.tasks.task import Rows
from tfdp.training.changes import Changes
from tfdp.training.clock import after, clock
from tfdp.training.island import Island, IslandState, Round
from tfdp.training.island_variables import IslandVariables
from tfdp.training.ledger import Spike
from tfdp.training.requests import Requests
from tfdp.training.step_statistics import StepResults, StepStatistics
from tfdp.training.update import assign_all

PHASES = ("input", "islands", "reduction", "outer")  # of a round's time


class Outcome(NamedTuple):
    """What a round came to; but for the seconds the same on all replicas."""

    statistics: tf.Tensor  # (num_islands, synchronize_every, size of StepStatistics)
    digests: tf.Tensor  # of what all replicas held before it
    requests: tf.Tensor  # see `Requests`
    seconds: tf.Tensor  # of `PHASES`


class LocalSteps:
    """Runs rounds; make it inside or outside the scope, once per run.

    Args:
      strategy: that the weights were made under.
      island: what an island does in a round.
      optimizer: with the weights, and the state of the first island of a replica.
      outer: the outer optimizer.
      changes: how those of all islands come together.
      frozen: variables that nothing changes, which all replicas hold alike.
      num_islands: K; each replica carries the same number of them, a power of two.
      synchronize_every: H, steps of a round.
      num_steps: of the run, whose last round may be shorter.
      rows_of_island: rows of an island in a step.
      num_sources: of the text.
      skips_refused: whether to go on where an island refuses an update; else its round is not applied.
      verifies: whether each round compares what all replicas hold.
      parallel_islands: that a replica computes at the same time.
    """

    phases: tuple[str, ...] = PHASES

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        island: Island,
        optimizer: Optimizer,
        outer: OuterOptimizer,
        changes: Changes,
        frozen: Sequence[keras.Variable],
        num_islands: int,
        synchronize_every: int,
        num_steps: int,
        rows_of_island: int,
        num_sources: int = 1,
        skips_refused: bool = False,
        verifies: bool = False,
        parallel_islands: int = 1,
    ) -> None:
        self._strategy, self._island, self._outer = strategy, island, outer
        self._weights, self._names = optimizer.weights, [weight.path for weight in optimizer.weights]
        self._synchronize_every, self._num_steps, self._rows = synchronize_every, num_steps, rows_of_island
        self._skips_refused, self._parallel_islands = skips_refused, parallel_islands
        num_replicas = int(strategy.num_replicas_in_sync)
        self._num_local = num_islands // num_replicas
        with strategy.scope():
            self._islands = IslandVariables(strategy, optimizer, num_islands, changes.keeps_errors)
        self._changes, self._shared = changes, [*self._weights, *outer.momentum, *frozen]
        self._verifies = verifies and num_replicas > 1
        self._digests_shape = (num_replicas, len(self._shared), 2) if self._verifies else (0,)
        shape = (num_replicas, self._num_local, synchronize_every, StepStatistics.size(num_sources))
        self._statistics_shape = (num_islands, *shape[2:])
        self._facts = Packed([(num_islands,), (), (), self._digests_shape, shape])
        self.reduction_bytes = changes.reduction_bytes(self._facts.size) / synchronize_every
        self.num_reductions = changes.num_reductions / synchronize_every
        self._requests = Requests()
        self._outer_values = tf.function(self._outer_step, jit_compile=True, autograph=False)
        self._digests = tf.function(self._own_digests, jit_compile=True, autograph=False)
        self._gather_digests = tf.function(
            lambda: strategy.run(lambda: collectives.replica_gather(self._digests())), autograph=False
        )
        self._run = tf.function(self._run_round, autograph=False)

    # What a checkpoint holds

    def named_state(self) -> dict[str, Any]:
        """The state of the outer optimizer and of all islands, by name."""
        return {**self._outer.named_state(), **self._islands.named()}

    def collect(self) -> None:
        """Brings the state of islands that other workers carry here; all workers call it together."""
        self._islands.collect()

    def metrics(self) -> dict[str, float | int]:
        return {}

    def to_state(self) -> dict[str, Any]:
        return {}  # all of it is in variables

    def load_state(self, state: Mapping[str, Any]) -> None:
        return

    # When

    def boundary(self, step: int) -> int:
        """The first end of a round at or after a step: where a run can be evaluated, saved and stopped."""
        return min(-(-step // self._synchronize_every) * self._synchronize_every, max(step, self._num_steps))

    def request_stop(self) -> None:
        """Ends the running call after its round, on every worker; from any thread."""
        self._requests.stop()

    def request_end(self) -> None:
        """The same, but the run has reached its end; on the chief alone, once. A stop request on any worker wins."""
        self._requests.end()

    def verify(self, step: int) -> Disagreement | None:
        """Compares what the replicas hold between two rounds, in a small reduction that all workers must enter."""
        if not self._verifies:
            return None
        digests = collectives.first_replica(self._strategy, self._gather_digests())
        return None if bool(consistency.agree(digests)) else self._disagreement(digests)

    def last_comparison(self, first_step: int, num_steps: int) -> int | None:
        """The start of the last of some rounds, before which the replicas compared what they hold."""
        if not self._verifies or not num_steps:
            return None
        last = first_step + num_steps - 1
        return max(first_step, last - last % self._synchronize_every)

    def _disagreement(self, digests: tf.Tensor) -> Disagreement:
        return consistency.find_disagreement(digests.numpy(), [variable.path for variable in self._shared])

    # Rounds

    def __call__(self, batches: Iterator[Any], first_step: int, num_steps: int) -> StepResults:
        """Runs rounds until `num_steps` steps are done; see `boundary`.

        It ends early before a round that is refused, and after the one in which a stop request arrived.

        Args:
          batches: an iterator of `pipeline.train_batches`, standing at `first_step`.
          first_step: number of steps done before.
          num_steps: how many to run.
        """
        step, last, found, skipped = first_step, first_step + num_steps, [], []
        assert self.boundary(last) == last, "a call ends with a round"
        spike = disagreement = None
        seconds, requests = np.zeros(len(PHASES)), 0.0
        while step < last and requests <= 0 and spike is None and disagreement is None:
            length = self.boundary(step + 1) - step
            outcome = self.run_round(batches, tf.constant(step, tf.int64), tf.constant(length))
            rows = np.asarray(outcome.statistics)[:, :length]
            seconds, requests = seconds + np.asarray(outcome.seconds), float(outcome.requests)
            refused = self._refused(rows, step)
            if self._verifies and not bool(consistency.agree(outcome.digests)):
                disagreement = self._disagreement(outcome.digests)
            elif refused and not self._skips_refused:
                spike = refused[0]
            else:
                found.append(rows)
                skipped += refused
                step += length
        none = np.zeros((self._statistics_shape[0], 0, self._statistics_shape[2]), np.float32)
        each = StepStatistics.from_vector(np.concatenate([none, *found], axis=1))
        return StepResults.of_islands(each, skipped, spike, disagreement, requests, seconds)

    def _refused(self, rows: np.ndarray, first_step: int) -> list[Spike]:
        each, names = StepStatistics.from_vector(rows), [*self._names, "loss", None]
        return [
            Spike(
                first_step + int(index) + 1,
                float(each.loss[island, index]),
                float(each.grad_norm[island, index]),
                float(each.limit[island, index]),
                names[int(each.refused[island, index])],
                int(island),
            )
            for index, island in np.argwhere(~each.was_applied.T)
        ]

    def run_round(self, batches: Iterator[Any], first_step: tf.Tensor, num_steps: tf.Tensor) -> Outcome:
        """One round of all islands."""
        found: Outcome = self._run(batches, first_step, num_steps)
        return found

    def _run_round(self, batches: Iterator[Any], first_step: tf.Tensor, num_steps: tf.Tensor) -> Outcome:
        begun = clock(first_step)
        rows = pipeline.rows_of_steps(self._strategy, batches, after(begun, num_steps))
        arrived = clock(*(of_replica["tokens"] for of_replica in rows))
        per_replica = self._strategy.run(self._replica_round, args=(rows, first_step, num_steps, begun, arrived))
        return Outcome(*collectives.first_replica(self._strategy, per_replica))

    def _replica_round(
        self, rows: list[Rows], first_step: tf.Tensor, num_steps: tf.Tensor, begun: tf.Tensor, arrived: tf.Tensor
    ) -> Outcome:
        own = rows[collectives.local_replica_index()]
        weights = [tf.convert_to_tensor(weight.value) for weight in self._weights]
        rounds = self._rounds(weights, own, first_step)
        computed = clock(*(found.statistics for found in rounds), *(found.message[0] for found in rounds))
        return self._join(weights, rounds, num_steps, [begun, arrived, computed])

    def _join(
        self, weights: list[tf.Tensor], rounds: list[Round], num_steps: tf.Tensor, times: list[tf.Tensor]
    ) -> Outcome:
        """Makes one model of the islands of all replicas; in replica context, with those of this one.

        Args:
          weights: that all islands started from.
          rounds: of the islands of this replica.
          num_steps: of the round.
          times: when the round began, its rows had arrived, and the islands were computed.
        """
        packed = after(times[-1], Packed.pack(self._facts_of(rounds, num_steps)))
        changes, sums = self._changes.join([found.message for found in rounds], packed)
        reduced = clock(sums, *changes)
        tokens, refused, requests, digests, each = self._facts.unpack(after(reduced, sums))
        good = consistency.agree(digests) & (self._skips_refused | (refused <= 0))
        states = [found.state for found in rounds]
        written = tf.cond(good, lambda: self._write(weights, states, changes, tokens), lambda: tf.constant(0.0))
        seconds = tf.stack([later - earlier for earlier, later in pairwise([*times, reduced, clock(sums, written)])])
        return Outcome(tf.reshape(each, self._statistics_shape), digests, requests, seconds)

    def _facts_of(self, rounds: list[Round], num_steps: tf.Tensor) -> list[tf.Tensor]:
        """What all replicas must know of a round, beside the changes."""
        tokens, statistics = tf.stack([found.tokens for found in rounds]), [found.statistics for found in rounds]
        refused = ~StepStatistics.from_vector(tf.stack(statistics)).was_applied
        missing = self._synchronize_every - num_steps  # room for the statistics of a whole round
        padded = tf.stack([tf.pad(each, [[0, missing], [0, 0]]) for each in statistics])
        padded = tf.ensure_shape(padded, [len(rounds), *self._statistics_shape[1:]])
        return [
            collectives.replica_slots(tokens),
            tf.cast(tf.reduce_any(refused), tf.float32),
            self._requests.value(),
            self._digest_slots(),
            collectives.replica_slots(padded),
        ]

    def _rounds(self, weights: list[tf.Tensor], rows: Rows, first_step: tf.Tensor) -> list[Round]:
        """Those of the islands that this replica carries, some at the same time."""
        rounds: list[Round] = []
        for index in range(self._num_local):
            ready = [rounds[index - self._parallel_islands].statistics] if index >= self._parallel_islands else []
            with tf.control_dependencies(ready):
                of_island = self._rows_of(rows, index)
                rounds.append(self._island.round(weights, self._islands.state(index), of_island, first_step))
        return rounds

    def _rows_of(self, rows: Rows, index: int) -> Rows:
        """Those of one island of a replica, a copy."""
        own = slice(index * self._rows, (index + 1) * self._rows)
        return {key: tf.identity(value[:, own]) for key, value in rows.items()}

    def _write(
        self, weights: list[tf.Tensor], states: list[IslandState], changes: list[tf.Tensor], tokens: tf.Tensor
    ) -> tf.Tensor:
        """Takes the round: the outer step, and the state of the islands."""
        momentum = [tf.convert_to_tensor(variable.value) for variable in self._outer.momentum]
        moved, momentum = self._outer_values(weights, momentum, changes, tokens)
        written = assign_all([*self._weights, *self._outer.momentum], [*moved, *momentum])
        return written + self._islands.write(states)

    def _outer_step(
        self, weights: list[tf.Tensor], momentum: list[tf.Tensor], changes: list[tf.Tensor], tokens: tf.Tensor
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        factor = 1.0 / tf.maximum(fixed_sum(tokens), 1.0)
        return self._outer.values(weights, momentum, [change * factor for change in changes])

    def _digest_slots(self) -> tf.Tensor:
        if not self._verifies:
            return tf.zeros(self._digests_shape)
        return collectives.replica_slots(self._digests())

    def _own_digests(self) -> tf.Tensor:
        return consistency.digests([tf.convert_to_tensor(variable.value) for variable in self._shared])

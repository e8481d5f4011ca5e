"""Local steps on a pool: the chief hands out the rounds of islands, and whoever is there computes them.

The chief holds everything: the outer weights, the outer optimizer and the state of every island. The parameter servers
hold a copy of the outer weights, which workers read. A task is the round of one island; its state and its rows travel
to the worker, and what it came to travels back. So a worker that is lost costs the rounds that it was computing, a
worker that comes gets the next one, and a slow one gets fewer. A round is a pure function, so it can be computed twice,
and the bits are those of `local.py`, whose one replica carries all islands.
"""

import time
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tfdp.data import pipeline
from tfdp.parallel.pool import Pool
from tfdp.tasks.task import Rows
from tfdp.training.island import IslandState, Round
from tfdp.training.local import LocalSteps, Outcome


class CoordinatedSteps(LocalSteps):
    """Runs rounds on a pool.

    Args:
      pool: of workers.
      given: as for `LocalSteps`, under the strategy of one device of the chief.
    """

    def __init__(self, pool: Pool, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._pool = pool
        self._mirrors = pool.variables([weight.numpy() for weight in self._weights])
        self._compute = tf.function(self._round_of_worker, autograph=False)
        self._read = tf.function(self._rows_of_islands, autograph=False)
        self._finish = tf.function(self._joined, autograph=False)

    def run_round(self, batches: Iterator[Any], first_step: tf.Tensor, num_steps: tf.Tensor) -> Outcome:
        times = [time.time()]
        rows = self._read(batches, num_steps)
        for mirror, weight in zip(self._mirrors, self._weights, strict=True):
            mirror.assign(weight.numpy())
        times.append(time.time())
        tasks = [(self._islands.state(island), of_island, first_step) for island, of_island in enumerate(rows)]
        rounds = dict(self._pool.compute(self._compute, tasks))
        times.append(time.time())
        in_order = [rounds[island] for island in range(len(tasks))]
        return Outcome(*self._finish(in_order, num_steps, [tf.constant(each, tf.float64) for each in times]))

    def _rows_of_islands(self, batches: Iterator[Any], num_steps: tf.Tensor) -> list[Rows]:
        [rows] = pipeline.rows_of_steps(self._strategy, batches, num_steps)
        return [self._rows_of(rows, island) for island in range(self._num_local)]

    def _round_of_worker(self, state: IslandState, rows: Rows, first_step: tf.Tensor) -> Round:
        weights = [tf.identity(mirror) for mirror in self._mirrors]
        return self._island.round(weights, state, rows, first_step)

    def _joined(self, rounds: list[Round], num_steps: tf.Tensor, times: list[tf.Tensor]) -> Outcome:
        def join() -> Outcome:
            weights = [tf.convert_to_tensor(weight.value) for weight in self._weights]
            return self._join(weights, rounds, num_steps, times)

        [outcome] = self._strategy.experimental_local_results(self._strategy.run(join))
        return outcome

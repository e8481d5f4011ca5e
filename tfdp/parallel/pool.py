"""A pool of workers that compute what a coordinator hands out, on TensorFlow's own engine for parameter servers.

The chief makes a `ParameterServerStrategy` over plain servers (`tf.distribute.Server`): workers, which compute, and
parameter servers, which hold what all workers read. `ClusterCoordinator` sends functions to workers, again where one is
lost, and takes a worker that comes back. It cannot take a function back from a worker that is stopped or cut off; so
here a task that lasts too long is handed out once more, and whichever copy ends first counts. Tasks are pure functions
whose results return to the chief: what a late copy computes reaches nothing.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfdp.parallel.cluster_spec import Jobs
from tfdp.system.exits import TrainingError

_LEAST_PATIENCE = 10.0  # seconds before a task is handed out once more
_PATIENCE = 4.0  # times the usual seconds of a task


@dataclass
class _Task:
    """What is handed out."""

    key: int
    arguments: tuple[Any, ...]
    since: float = 0.0  # when it was handed out last


class Pool:
    """The workers; make it on the chief, before any device is touched.

    Args:
      jobs: the processes of this job.
    """

    def __init__(self, jobs: Jobs) -> None:
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            _spec(jobs), task_type="chief", task_id=0, rpc_layer="grpc"
        )
        self._strategy = tf.distribute.ParameterServerStrategy(resolver)
        self._coordinator = tf.distribute.coordinator.ClusterCoordinator(self._strategy)
        self._num_workers = len(jobs.addresses["worker"])
        self._seconds: list[float] = []  # of the last tasks

    def variables(self, values: Sequence[np.ndarray]) -> list[tf.Variable]:
        """Variables on the parameter servers, in turn."""
        with self._strategy.scope():
            return [tf.Variable(value, trainable=False) for value in values]

    def compute(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Computes a function of each tuple of arguments on some worker; (number, result) as they come.

        Args:
          function: a `tf.function` without side effects.
          tasks: its arguments.

        Raises:
          TrainingError: the function fails, or a parameter server is lost.
        """
        waiting = {key: _Task(key, arguments) for key, arguments in enumerate(tasks)}
        results: queue.Queue[tuple[int, Any]] = queue.Queue()
        for task in waiting.values():
            self._hand_out(function, task, results)
        while waiting:
            try:
                key, result = results.get(timeout=0.5)
            except queue.Empty:
                for task in waiting.values():
                    if time.monotonic() - task.since > self._patience(len(waiting)):
                        self._hand_out(function, task, results)
                continue
            if isinstance(result, BaseException):
                raise TrainingError(f"a worker of the pool failed: {result}")
            if key in waiting:
                self._seconds = [*self._seconds[-20:], time.monotonic() - waiting.pop(key).since]
                yield key, result

    def _patience(self, num_waiting: int) -> float:
        usual = float(np.median(self._seconds)) if self._seconds else 60.0
        rounds = -(-num_waiting // self._num_workers)  # a task may wait for others on the same worker
        return max(_LEAST_PATIENCE, _PATIENCE * usual * rounds)

    def _hand_out(self, function: Callable[..., Any], task: _Task, results: "queue.Queue[tuple[int, Any]]") -> None:
        task.since = time.monotonic()
        remote = self._coordinator.schedule(function, args=task.arguments)

        def wait() -> None:
            try:
                results.put((task.key, remote.get()))
            except BaseException as error:
                results.put((task.key, error))

        threading.Thread(target=wait, daemon=True).start()


def serve(jobs: Jobs, is_chief_there: Callable[[], bool]) -> None:
    """Serves as a worker or a parameter server until the chief, once it was there, has been gone for a while."""
    server = tf.distribute.Server(_spec(jobs), job_name=jobs.kind, task_index=jobs.index, protocol="grpc")
    seen, missing_since = False, 0.0
    while True:
        time.sleep(1.0)
        if is_chief_there():
            seen, missing_since = True, 0.0
        elif seen:
            missing_since = missing_since or time.monotonic()
            if time.monotonic() - missing_since > 5.0:
                break
    del server


def _spec(jobs: Jobs) -> tf.train.ClusterSpec:
    return tf.train.ClusterSpec({name: list(addresses) for name, addresses in jobs.addresses.items()})

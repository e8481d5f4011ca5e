"""The state of islands between rounds: in variables of the replicas that carry them, and by name for a checkpoint.

A mirrored variable has a copy on each replica; here each copy belongs to another island. TensorFlow's own checkpoints
would keep one of them. A name is that of an island and a variable, the same under every layout.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdp.optim.optimizer import Optimizer
from tfdp.parallel import collectives
from tfdp.training import spikes
from tfdp.training.island import IslandState
from tfdp.training.update import assign_all


class IslandVariable:
    """One variable of one island.

    Args:
      copy: that of the replica that carries the island; None where that is a replica of another worker.
      value: the first one.
    """

    def __init__(self, path: str, copy: tf.Variable | None, value: np.ndarray) -> None:
        self.path, self.shape = path, tuple(value.shape)
        self._copy, self._elsewhere = copy, None if copy is not None else value

    def numpy(self) -> np.ndarray:
        """The value; where another worker has it, that of the last `collect`."""
        found = self._elsewhere if self._copy is None else self._copy.numpy()
        return np.asarray(found)

    def keep(self, value: np.ndarray) -> None:
        """Remembers a value that another worker has."""
        if self._copy is None:
            self._elsewhere = value

    def assign(self, value: np.ndarray) -> None:
        """Assigns on the worker that has it; all workers call it."""
        if self._copy is None:
            self._elsewhere = value
        else:
            self._copy.assign(value)


class IslandVariables:
    """The variables of all islands; make it inside `strategy.scope()`.

    Args:
      strategy: of the replicas.
      optimizer: whose state is that of the first island of each replica.
      num_islands: a multiple of the number of replicas. Replica r carries islands r * m .. r * m + m - 1.
      keeps_errors: whether an island keeps what its messages lose.
    """

    def __init__(
        self, strategy: tf.distribute.Strategy, optimizer: Optimizer, num_islands: int, keeps_errors: bool
    ) -> None:
        self._strategy = strategy
        self._num_local = num_islands // int(strategy.num_replicas_in_sync)
        weights, self._num_state = optimizer.weights if keeps_errors else [], len(optimizer.state)
        names = [*optimizer.named_state(), "recent_losses"]
        names += [f"error/{index:05d}/{weight.path}" for index, weight in enumerate(weights)]
        first_copies = [strategy.experimental_local_results(variable.value)[0] for variable in optimizer.state]
        initial = [*(copy.numpy() for copy in first_copies), spikes.recent_from_state([])]
        initial += [np.zeros(weight.shape, np.float32) for weight in weights]
        self._slots: list[list[keras.Variable]] = []
        for index in range(self._num_local):
            given = optimizer.state if index == 0 else []
            self._slots.append([*given, *(_variable(value) for value in initial[len(given) :])])
        self._named: dict[str, IslandVariable] = {}
        local = collectives.num_local_replicas(strategy)
        first_replica = collectives.worker_index(strategy) * local
        for island in range(num_islands):
            replica, slot = divmod(island, self._num_local)
            here = first_replica <= replica < first_replica + local
            for name, variable, value in zip(names, self._slots[slot], initial, strict=True):
                copies = strategy.experimental_local_results(variable.value)
                path = f"island/{island:04d}/{name}"
                self._named[path] = IslandVariable(path, copies[replica - first_replica] if here else None, value)
        self._gather = tf.function(lambda slot: strategy.run(self._gather_slot, args=(slot,)), autograph=False)

    def named(self) -> dict[str, IslandVariable]:
        return dict(self._named)

    def state(self, slot: int) -> IslandState:
        """That of an island of this replica, in a replica context."""
        values, count = [tf.convert_to_tensor(variable.value) for variable in self._slots[slot]], self._num_state
        return IslandState(values[:count], values[count], values[count + 1 :])

    def write(self, states: Sequence[IslandState]) -> tf.Tensor:
        """Writes the state of all islands of this replica; returns a scalar that depends on it."""
        written = [
            assign_all(variables, [*state.optimizer, state.recent_losses, *state.errors])
            for variables, state in zip(self._slots, states, strict=True)
        ]
        return tf.add_n(written)

    def collect(self) -> None:
        """Brings here what other workers have; all workers call it together."""
        if collectives.num_workers(self._strategy) == 1:
            return
        for slot in range(self._num_local):
            gathered = collectives.first_replica(self._strategy, self._gather(slot))
            for replica, of_replica in enumerate(zip(*(each.numpy() for each in gathered), strict=True)):
                start = f"island/{replica * self._num_local + slot:04d}/"
                named = [variable for path, variable in self._named.items() if path.startswith(start)]
                for variable, value in zip(named, of_replica, strict=True):
                    variable.keep(value)

    def _gather_slot(self, slot: int) -> list[tf.Tensor]:
        context: Any = tf.distribute.get_replica_context()
        values = [tf.convert_to_tensor(variable.value) for variable in self._slots[slot]]
        return [context.all_gather(value[tf.newaxis], axis=0) for value in values]


def _variable(value: np.ndarray) -> keras.Variable:
    return keras.Variable(value, dtype=str(value.dtype), trainable=False, name="of_an_island")

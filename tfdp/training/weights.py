"""The numbers of a run in sets, each by path: what is trained, what is frozen, the optimizer's state, and an average.

Digests and counts are of the trainable weights where nothing else is said: the frozen ones are the same at every step.
This module needs no TensorFlow to be imported.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tfdp.system.exits import ConfigError

if TYPE_CHECKING:
    import keras


Tensors = dict[str, np.ndarray]
Variables = Mapping[str, "keras.Variable"]


@dataclass(frozen=True)
class WeightSets:
    """The variables of a run."""

    trainable: Variables
    frozen: Variables
    optimizer: Variables
    average: Variables = field(default_factory=dict)  # of the trainable ones, by the same names, where a run has one

    def snapshot(self) -> tuple[Tensors, Tensors]:
        """Host copies of what a step changes: the trainable weights, and the optimizer's state."""
        return snapshot(self.trainable), snapshot(self.optimizer)

    def restore(self, trainable: Tensors, optimizer: Tensors, frozen: Tensors, average: Tensors | None = None) -> None:
        """Assigns what a checkpoint holds; one without frozen weights leaves them as they are.

        The average of a run whose checkpoint has none starts from the weights of that checkpoint.
        """
        restore(self.trainable, trainable)
        restore(self.optimizer, optimizer)
        if self.average:
            restore(self.average, average or trainable)
        if frozen:
            restore(self.frozen, frozen)

    def digests(self) -> dict[str, str]:
        """`weights_sha256` and `state_sha256`; see `digests_of`."""
        return digests_of(*self.snapshot(), snapshot(self.average))


def snapshot(variables: Variables) -> Tensors:
    """Copies variables to the host, under the names given (`numpy` of an eager tensor is a copy already)."""
    return {name: np.asarray(variable.numpy()) for name, variable in variables.items()}


def restore(variables: Variables, tensors: Mapping[str, np.ndarray]) -> None:
    """Assigns tensors to variables of the same names and shapes, on every replica of this worker.

    Raises:
      ConfigError: names or shapes differ, listing every difference.
    """
    shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
    saved = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    refuse_differences({name: list(shape) for name, shape in saved.items()}, {n: list(s) for n, s in shapes.items()})
    for name, variable in variables.items():
        variable.assign(tensors[name])


def refuse_differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises `ConfigError` that lists where a checkpoint and this run differ."""
    differing = [key for key in {**saved, **wanted} if saved.get(key) != wanted.get(key)]
    if differing:
        listed = "; ".join(f"{key} is {saved.get(key)} there and {wanted.get(key)} here" for key in differing)
        raise ConfigError(f"run_dir holds the checkpoints of another run: {listed}; name another run_dir")


def digests_of(
    weights: Mapping[str, np.ndarray],
    optimizer: Mapping[str, np.ndarray],
    average: Mapping[str, np.ndarray] | None = None,
) -> dict[str, str]:
    """sha256 over the float32 bytes of every tensor by name: of the weights; and of those with all other state."""
    total = hashlib.sha256()
    found = {}
    for key, sets in (("weights_sha256", [weights]), ("state_sha256", [optimizer, average or {}])):
        for tensors in sets:
            for name in sorted(tensors):
                total.update(bytes_of(np.asarray(tensors[name], dtype="<f4")))
        found[key] = total.hexdigest()
    return found


def bytes_of(tensor: np.ndarray) -> memoryview:
    """The memory of a tensor, without a copy where it lies in C order."""
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data

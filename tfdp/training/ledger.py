"""The spikes of a run: the steps that were not applied, and the positions that are excluded since.

It needs no TensorFlow, so that a run directory can be read, and refused, before that is loaded.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spike:
    """A step that was not applied."""

    step: int  # its number in the metrics, from 1
    loss: float
    grad_norm: float
    limit: float  # largest loss that would not have been a spike
    tensor: str | None  # the first one whose gradient is not finite, "loss", or None where the loss is above the limit
    island: int | None = None  # which refused it, where islands take steps of their own

    def describe(self) -> str:
        """What is wrong, for people."""
        where = f"step {self.step}" + ("" if self.island is None else f" of island {self.island}")
        if self.tensor == "loss":
            return f"{where}: the loss is not finite"
        if self.tensor is not None:
            return f"{where}: the gradient of {self.tensor} is not finite"
        return f"{where}: the loss {self.loss:.4f} is above {self.limit:.4f}, far beyond the steps before it"


@dataclass
class Ledger:
    """The spikes of a run, and the positions of the global order that they have excluded; part of its checkpoints."""

    spikes: list[dict[str, Any]] = field(default_factory=list)
    excluded_positions: set[int] = field(default_factory=set)

    def record(self, spike: Spike, action: str, positions: Iterable[int] = ()) -> dict[str, Any]:
        """Adds a spike and the positions to exclude; returns what was recorded."""
        offenders = sorted(positions)
        entry = {
            "step": spike.step,
            "spike_loss": spike.loss if math.isfinite(spike.loss) else None,
            "spike_limit": spike.limit if math.isfinite(spike.limit) else None,
            "spike_tensor": spike.tensor,
            "spike_action": action,
            "spike_positions": offenders,
            **({} if spike.island is None else {"spike_island": spike.island}),
        }
        self.spikes.append(entry)
        self.excluded_positions.update(offenders)
        return entry

    def to_state(self) -> dict[str, Any]:
        return {"spikes": self.spikes, "left_out": sorted(self.excluded_positions)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Ledger":
        return cls(list(state.get("spikes", [])), set(state.get("left_out", [])))

"""Spikes: steps that should not be applied, and the sequences that caused them.

A step is a spike if a gradient or its loss is not finite, or if its loss lies above `median + threshold * scale` of
the steps before it, where scale is the standard deviation estimated from the median absolute deviation (Hampel
1974), and at least 5 % of the median. The losses are those after the reduction and the rule is a pure function of
them, so all workers come to the same verdict, under every layout and after a resume.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

WINDOW = 50  # steps looked back on
_ENOUGH = 20  # steps before there is a verdict
_MAD_TO_STDDEV = 1.4826  # of a normal distribution
_LEAST_SCALE = 0.05  # of the median


@dataclass(frozen=True)
class Spike:
    """A step that was not applied."""

    step: int  # number of the step as metrics tell it, from 1
    loss: float
    grad_norm: float
    limit: float  # largest loss that would not have been a spike
    tensor: str | None  # the first one whose gradient is not finite, "loss", or None where the loss is above the limit

    def describe(self) -> str:
        """What is wrong, for people."""
        if self.tensor == "loss":
            return f"step {self.step}: the loss is not finite"
        if self.tensor is not None:
            return f"step {self.step}: the gradient of {self.tensor} is not finite"
        return f"step {self.step}: the loss {self.loss:.4f} is above {self.limit:.4f}, far beyond the steps before it"


def robust_limit(values: tf.Tensor, threshold: float | None, enough: int = _ENOUGH) -> tf.Tensor:
    """The largest value that is no outlier; infinite while there are fewer than `enough`.

    Args:
      values: float32 (n,); those that are not finite are not there.
      threshold: in robust standard deviations; None: no limit.
      enough: values that a verdict needs.
    """
    if threshold is None:
        return tf.constant(math.inf)
    present = tf.math.is_finite(values)
    count = tf.reduce_sum(tf.cast(present, tf.int32))
    middle = tf.maximum(count - 1, 0) // 2
    median = tf.sort(tf.where(present, values, math.inf))[middle]
    deviation = tf.sort(tf.where(present, tf.abs(values - median), math.inf))[middle]
    scale = tf.maximum(_MAD_TO_STDDEV * deviation, _LEAST_SCALE * tf.abs(median))
    return tf.where(count >= enough, median + threshold * scale, math.inf)


def offending_rows(row_losses: np.ndarray, threshold: float | None) -> list[int]:
    """The rows of a batch that stand out: a loss that is not finite, or an outlier among the rows.

    Args:
      row_losses: mean loss of each row, (rows,); 0 for rows without a valid token.
    """
    limit = float(robust_limit(tf.constant(row_losses, tf.float32), threshold, enough=4))
    return [index for index, loss in enumerate(row_losses) if not loss <= limit or not math.isfinite(loss)]


@dataclass
class Ledger:
    """The spikes of a run, and the positions of the global order that it leaves out since; part of its checkpoints."""

    spikes: list[dict[str, Any]] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)

    def record(self, spike: Spike, action: str, positions: Iterable[int] = ()) -> dict[str, Any]:
        """Adds a spike and the positions to leave out; returns what was recorded."""
        offenders = sorted(positions)
        entry = {
            "step": spike.step,
            "spike_loss": spike.loss if math.isfinite(spike.loss) else None,
            "spike_limit": spike.limit if math.isfinite(spike.limit) else None,
            "spike_tensor": spike.tensor,
            "spike_action": action,
            "spike_positions": offenders,
        }
        self.spikes.append(entry)
        self.left_out.update(offenders)
        return entry

    def to_state(self) -> dict[str, Any]:
        return {"spikes": self.spikes, "left_out": sorted(self.left_out)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Ledger":
        return cls(list(state.get("spikes", [])), set(state.get("left_out", [])))


def recent_to_state(recent: np.ndarray) -> list[float]:
    """The window of recent losses without its empty places, for JSON."""
    return [float(loss) for loss in recent[np.isfinite(recent)]]


def recent_from_state(losses: Sequence[float]) -> np.ndarray:
    """The window again: float32 (WINDOW,), the newest last, empty places infinite."""
    window = np.full(WINDOW, math.inf, np.float32)
    if losses:
        window[-len(losses) :] = losses
    return window

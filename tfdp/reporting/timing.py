"""Where the time of a run goes."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import tensorflow as tf

from tfdp.reporting.writer import reason
from tfdp.system.console import say


class Throughput:
    """Time, targets and sequences of training alone; evaluations, samples and saves do not count."""

    def __init__(self) -> None:
        self.seconds, self.num_tokens, self.num_steps, self.num_sequences = 0.0, 0, 0, 0

    def add(self, seconds: float, num_tokens: int, num_steps: int, num_sequences: int = 0) -> None:
        self.seconds += seconds
        self.num_tokens += num_tokens  # that are learned
        self.num_steps += num_steps
        self.num_sequences += num_sequences  # rows that are computed, whatever is learned of them

    @property
    def step_seconds(self) -> float:
        return self.seconds / max(1, self.num_steps)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def sequences_per_second(self) -> float:
        return self.num_sequences / self.seconds if self.seconds > 0 else 0.0

    def computed_tokens_per_second(self, tokens_per_sequence: float) -> float:
        """Tokens of all rows, whether they are learned or only seen."""
        return self.sequences_per_second * tokens_per_sequence


class Attribution:
    """Where the time of a process went: every second since it was made belongs to one part.

    Attributes:
      seconds: of each part since `restart`; total: since the beginning.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.total: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, part: str, within: Mapping[str, float] | None = None) -> float:
        """Adds the seconds since the last lap to `part`, except those that `within` gives to others; returns all."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        parts = dict(within or {})
        parts[part] = parts.get(part, 0.0) + elapsed - sum(parts.values())
        for name, seconds in parts.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.total[name] = self.total.get(name, 0.0) + seconds
        return elapsed

    def restart(self) -> None:
        self.seconds = {}


class Trace:
    """A profile of the steps first + 1 .. last, for TensorBoard's profile page, by the chief.

    Args:
      steps: (first, last), or () for none.
      folder: of the TensorBoard data.
    """

    def __init__(self, steps: tuple[int, ...], folder: Path, is_chief: bool) -> None:
        self._steps, self._folder, self._running = steps if is_chief else (), folder, False

    def follow(self, step: int, ends: bool) -> None:
        """To be called between steps: starts and stops the profiler at its steps."""
        if not self._steps:
            return
        try:
            if self._running and (step >= self._steps[1] or ends):
                self._running = False
                tf.profiler.experimental.stop()
                say(f"profile    of steps {self._steps[0] + 1} to {step} in {self._folder}")
            elif not self._running and self._steps[0] <= step < self._steps[1] and not ends:
                tf.profiler.experimental.start(str(self._folder))
                self._running = True
        except tf.errors.OpError as error:
            print(f"warning: the profile cannot be written: {reason(error)}", file=sys.stderr, flush=True)

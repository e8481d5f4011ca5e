"""What ends a run: its last step, its patience, or its time.

The first two follow from numbers that all workers have. The time is the chief's: its request travels in the reduction
of a step as a stop request does, so that all workers end after the same step.
"""

import threading
import time
from collections.abc import Callable

from tfdp.config.sections import TrainingConfig

STEPS, PATIENCE, MAX_SECONDS = "steps", "patience", "max_seconds"  # the keys of section training that end a run


def reason_to_end(training: TrainingConfig, step: int, num_not_better: int, seconds: float) -> str | None:
    """The key that a run has reached, the last step before the others; None: it goes on.

    Args:
      step: that it stands at.
      num_not_better: evaluations in a row that were not the best so far.
      seconds: of the run, over all its starts.
    """
    if step >= training.steps:
        return STEPS
    if training.patience is not None and num_not_better >= training.patience:
        return PATIENCE
    if training.max_seconds is not None and seconds >= training.max_seconds:
        return MAX_SECONDS
    return None


def describe(reason: str, training: TrainingConfig, step: int, best: str) -> str:
    """Why a run has ended before its last step, for people. `best` is the metric that patience looks at."""
    why = {
        PATIENCE: f"training.patience ({training.patience}) evaluations in a row had no better validation_{best}",
        MAX_SECONDS: f"training.max_seconds ({training.max_seconds}) have passed",
    }
    return f"after step {step} of {training.steps}: {why[reason]}"


class TimeLimit:
    """Calls a function once, from a thread of its own, unless its block ends before.

    Args:
      deadline: when, as `time.monotonic` counts; None: never.
      ask: what to call.
    """

    def __init__(self, deadline: float | None, ask: Callable[[], None]) -> None:
        self._deadline, self._ask, self._left = deadline, ask, threading.Event()

    def __enter__(self) -> "TimeLimit":
        if self._deadline is not None:
            threading.Thread(target=self._wait, args=(self._deadline,), name="time-limit", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _wait(self, deadline: float) -> None:
        while (seconds := deadline - time.monotonic()) > 0:
            if self._left.wait(seconds):
                return
        self._ask()

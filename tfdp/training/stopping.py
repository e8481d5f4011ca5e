"""Turns a signal into a stop request that travels in a step's reduction: all workers stop after the same step."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

from tfdp.system.console import say
from tfdp.system.exits import StopRequested, leave, stop_signals

if TYPE_CHECKING:
    from tfdp.training.synchronization import Steps


_UNWIND_SECONDS = 1.0  # for the main thread to end by itself, if it runs Python


class StopSignal:
    """Turns the signals that ask to stop into a stop request, even while TensorFlow holds the main thread.

    Before there are steps to stop, nothing can be lost, and a signal ends the process: by `StopRequested` in the main
    thread, or from outside if that sits in a call that waits for other workers. From then on a signal asks the steps.
    Python runs signal handlers in the main thread, which may sit in a call of many steps; but it writes the signal's
    number to a pipe at once. A thread that reads the pipe sets the flag that the running steps look at. A second signal
    ends the process without a checkpoint.
    """

    def __init__(self) -> None:
        self._asked = False
        self._train_step: Steps | None = None
        self._left = threading.Event()

    def attach(self, train_step: "Steps") -> None:
        """Sets the step to stop; a signal that came earlier counts."""
        self._train_step = train_step
        if self._asked:
            train_step.request_stop()

    def __enter__(self) -> "StopSignal":
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            read_end, self._write_end = os.pipe()
            os.set_blocking(self._write_end, False)
            self._old_end = signal.set_wakeup_fd(self._write_end)
            self._old = {number: signal.signal(number, self._handle) for number in stop_signals()}
            threading.Thread(target=self._watch, args=(read_end,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._old:
            for number, handler in self._old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_end)
            os.close(self._write_end)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._train_step is None:
            raise _stopped(number)

    def _watch(self, read_end: int) -> None:
        while received := os.read(read_end, 1):
            number = received[0]
            if number not in self._old:
                continue
            name = signal.Signals(number).name
            if self._asked:
                with contextlib.suppress(OSError):  # the terminal is gone
                    print(f"{name} again: ending without a checkpoint", file=sys.stderr, flush=True)
                os._exit(128 + number)
            self._asked = True
            if self._train_step is None and not self._left.wait(_UNWIND_SECONDS) and self._train_step is None:
                leave(_stopped(number))
            if self._train_step is not None:
                self._train_step.request_stop()
                with contextlib.suppress(OSError):
                    say(f"{name}: stopping after this step, then saving a checkpoint; once more ends at once")
        os.close(read_end)


def _stopped(number: int) -> StopRequested:
    return StopRequested(f"{signal.Signals(number).name} before the first step: nothing was lost")

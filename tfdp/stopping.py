"""A signal becomes a request that rides in the step's own reduction, so that all workers stop after the same step."""

import os
import signal
import sys
import threading

from tfdp.metrics import say
from tfdp.step import TrainStep


class StopSignal:
    """Turns SIGINT and SIGTERM into a stop request, even while TensorFlow holds the main thread.

    Enter it as soon as the strategy is made, which takes SIGTERM for itself. Python runs signal handlers in the main
    thread, which may sit in a call of many steps; but it writes the signal's number to a pipe at once. A thread that
    reads the pipe sets the flag that the running steps look at. A second signal ends the process without a checkpoint.
    """

    def __init__(self) -> None:
        self._asked = False
        self._train_step: TrainStep | None = None

    def attach(self, train_step: TrainStep) -> None:
        """Names whose steps shall stop; a signal that came before counts."""
        self._train_step = train_step
        if self._asked:
            train_step.request_stop()

    def __enter__(self) -> "StopSignal":
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            read_end, self._write_end = os.pipe()
            os.set_blocking(self._write_end, False)
            self._old_end = signal.set_wakeup_fd(self._write_end)
            numbers = (signal.SIGINT, signal.SIGTERM)
            self._old = {number: signal.signal(number, lambda *_: None) for number in numbers}
            threading.Thread(target=self._watch, args=(read_end,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._old:
            for number, handler in self._old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_end)
            os.close(self._write_end)

    def _watch(self, read_end: int) -> None:
        while received := os.read(read_end, 1):
            number = received[0]
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            name = signal.Signals(number).name
            if self._asked:
                print(f"{name} again: ending without a checkpoint", file=sys.stderr, flush=True)
                os._exit(128 + number)
            say(f"{name}: stopping after this step, then saving a checkpoint; once more ends at once")
            self._asked = True
            if self._train_step is not None:
                self._train_step.request_stop()
        os.close(read_end)

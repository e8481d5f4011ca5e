"""Saves checkpoints beside the steps that follow."""

import os
import sys
import threading

from tfdp.training.checkpoint import Checkpoint, CheckpointFolder


class AsyncSaver:
    """Writes checkpoints in a thread, one at a time; a second save waits for the first.

    As a context manager it waits at the end of its block. An error of the thread is raised by the next call.
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        self.folder = folder
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "AsyncSaver":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:  # the block ended by another error, before anybody asked
            print(f"warning: {self._error}", file=sys.stderr, flush=True)

    def save(self, checkpoint: Checkpoint, background: bool = True) -> None:
        """Writes a checkpoint beside the steps that follow, or, where none does, at once and at full speed."""
        self.wait()
        if not background:
            self.folder.save(checkpoint)
            return
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), name="save-checkpoint")
        self._thread.start()

    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def raise_failure(self) -> None:
        """Raises the error of a save that has failed since; waits for none."""
        if not self.is_saving():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way, if there is one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            if sys.platform == "linux":
                # Runs where a core is idle, so that no step waits for it; nice 19 was not enough on two cores.
                os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
            self.folder.save(checkpoint, paced=True)
        except BaseException as error:
            self._error = error

"""A pool of processes that ends when its parent does, however that happens."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor


def make_pool(num_processes: int) -> ProcessPoolExecutor:
    """Processes that start afresh, at the first task: a fork of one that runs TensorFlow's threads may hang."""
    return ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Ignores SIGINT, which the parent handles, and ends this process as soon as the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

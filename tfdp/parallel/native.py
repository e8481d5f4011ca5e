"""Calls of TensorFlow that wait for other workers, made without holding Python's lock.

TensorFlow's own bindings of these functions keep the lock while they wait: no other thread of the process runs, so
nothing watches the peers or handles a signal. `ctypes` calls the same functions and releases the lock meanwhile.
"""

import ctypes
import functools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.05


def wait_at_barrier(context: Any, name: str, timeout_seconds: float) -> None:
    """Waits until every worker has come to the barrier.

    Args:
      context: TensorFlow's eager context.

    Raises:
      tf.errors.OpError: DeadlineExceededError after the timeout; others where a worker is gone.
    """
    context.ensure_initialized()
    _call("TFE_WaitAtBarrier", context._context_handle, name.encode(), ctypes.c_int64(int(timeout_seconds * 1000)))


@contextmanager
def joining_in_background(meanwhile: Callable[[], None]) -> Iterator[None]:
    """Makes TensorFlow join a cluster, which waits for all workers, in a thread; signals keep their handlers.

    Args:
      meanwhile: called repeatedly during the wait; an exception that it raises ends the wait.
    """
    from tensorflow.python import pywrap_tfe  # no public name; a test fails when TensorFlow moves it

    def join(handle: Any, server: bytes) -> None:
        with _kept_handlers() as restore:
            call = functools.partial(_call, "TFE_EnableCollectiveOps", handle, server, ctypes.c_size_t(len(server)))
            _run_in_background(call, [restore, meanwhile])

    original = pywrap_tfe.TFE_EnableCollectiveOps
    pywrap_tfe.TFE_EnableCollectiveOps = join
    try:
        yield
    finally:
        pywrap_tfe.TFE_EnableCollectiveOps = original


def _call(function: str, handle: Any, *arguments: Any) -> None:
    """Calls a C function that takes an eager context first and a status last; raises what the status says."""
    from tensorflow.compat.v1 import errors

    library = _library()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    status = ctypes.c_void_p(library.TF_NewStatus())
    try:
        library[function](ctypes.c_void_p(pointer(handle, None)), *arguments, status)
        code, message = library.TF_GetCode(status), library.TF_Message(status).decode(errors="replace")
    finally:
        library.TF_DeleteStatus(status)
    if code:
        raise errors.exception_type_from_error_code(code)(None, None, message)


@functools.cache
def _library() -> ctypes.CDLL:
    import tensorflow as tf

    [path] = Path(tf.sysconfig.get_lib()).glob("libtensorflow_cc.*")
    library = ctypes.CDLL(str(path))  # which this process has loaded already
    library.TF_NewStatus.restype = ctypes.c_void_p
    library.TF_Message.restype = ctypes.c_char_p
    return library


def _run_in_background(function: Callable[[], None], meanwhile: Sequence[Callable[[], None]]) -> None:
    """Runs a function in a thread until it ends, or until one of the functions called meanwhile raises."""
    done, errors = threading.Event(), list[Exception]()

    def run() -> None:
        try:
            function()
        except Exception as error:  # for the thread that waits
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True, name="join-cluster").start()
    while not done.wait(_POLL_SECONDS):
        for each in meanwhile:
            each()
    if errors:
        raise errors[0]


@contextmanager
def _kept_handlers() -> Iterator[Callable[[], None]]:
    """Yields a function that gives SIGTERM, which TensorFlow takes, back to its handler, as the block's end does."""
    handler = signal.getsignal(signal.SIGTERM)

    def restore() -> None:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)

    try:
        yield restore
    finally:
        restore()

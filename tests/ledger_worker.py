"""A worker that keeps a ledger: `python ledger_worker.py LEDGER DELAY FAULT ARGS OF tfdp.train`.

It trains as `python -m tfdp.train` does, and besides
- appends a line "step position position ..." to the file LEDGER for each step of each replica,
- takes DELAY seconds more for each step,
- if the file FAULT exists and this is the chief: reads a number n from it, removes it, and kills this process by
  SIGKILL at the n-th write, sync, rename or removal of a checkpoint.
"""

import json
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def keep_ledger(ledger: str, delay: float) -> None:
    import tensorflow as tf

    from tfdp.training.step import TrainStep

    file = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    replica_step = TrainStep._replica_step

    def write(step: Any, positions: Any) -> Any:
        os.write(file, f"{int(step)} {' '.join(map(str, positions))}\n".encode())
        time.sleep(delay)
        return step

    @tf.autograph.experimental.do_not_convert
    def recorded(self: TrainStep, batch: Any, step: tf.Tensor, *rest: Any) -> Any:
        step = tf.ensure_shape(tf.numpy_function(write, [step, batch["position"]], tf.int64), [])
        return replica_step(self, batch, step, *rest)

    TrainStep._replica_step = recorded  # type: ignore[method-assign]


def die_at(count: int) -> None:
    from tfdp.training import checkpoint

    left = [count]

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    checkpoint._write_synced = wrap(checkpoint._write_synced)
    for module, name in ((os, "fsync"), (os, "rename"), (shutil, "rmtree")):
        setattr(module, name, wrap(getattr(module, name)))


def main() -> None:
    ledger, delay, fault = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    sys.argv = ["tfdp.train", *sys.argv[4:]]
    from tfdp.system.startup import load_tensorflow

    load_tensorflow()
    keep_ledger(ledger, delay)
    task = json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": 0}}'))["task"]
    if task["index"] == 0 and fault.exists():
        count = int(fault.read_text())
        fault.unlink()
        die_at(count)
    runpy.run_module("tfdp.train", run_name="__main__")


if __name__ == "__main__":
    main()

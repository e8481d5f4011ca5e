"""What a run tells: one writer behind the console line, metrics.jsonl and TensorBoard; and what it measures.

step   100/2000 | loss 2.1453 | lr 6.0e-04 | grad norm 0.91 | 20.4 ms | 37,600 tok/s | mfu 41% | eta 38s
"""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tensorflow as tf

from tfdp.console import say
from tfdp.estimates import duration
from tfdp.machine import find_gpu
from tfdp.rows import RowWriter, drop_rows_after


class MetricsWriter:
    """Writes the metrics of a run; every method does nothing on a worker that is not the chief.

    Args:
      run_dir: gets metrics.jsonl and tensorboard/.
      resumed_step: rows of later steps, which a lost process wrote after its last checkpoint, are dropped:
        each step is told once.
      is_chief: whether this process speaks for the run.
    """

    def __init__(self, run_dir: Path, resumed_step: int, is_chief: bool = True) -> None:
        self._is_chief = is_chief
        if not is_chief:
            return
        self._path = run_dir / "metrics.jsonl"
        drop_rows_after(self._path, resumed_step)
        self._rows = RowWriter(self._path)
        self._boards = Boards(run_dir / "tensorboard")

    def train(
        self,
        values: Mapping[str, float | int],
        num_steps: int,
        eta_seconds: float,
        derived: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """One logged step.

        Args:
          values: the row: `step, loss, learning_rate, grad_norm, tokens_per_second, step_seconds, mfu, ...`.
          num_steps: of the run.
          eta_seconds: to its end.
          derived: what follows from them, for TensorBoard alone.
        """
        if not self._is_chief:
            return
        self._rows.write(_finite(values))
        self._boards.scalars("train", int(values["step"]), {**values, **derived})
        say(step_line(values, num_steps, eta_seconds))

    def validation(
        self, values: Mapping[str, float | int], num_steps: int, scalars: Mapping[str, float], texts: Sequence[str]
    ) -> None:
        """One evaluation.

        Args:
          values: the row: `step, validation_..., evaluation_seconds`.
          num_steps: of the run.
          scalars: for TensorBoard.
          texts: for people.
        """
        if not self._is_chief:
            return
        self._rows.write(_finite(values))
        step = int(values["step"])
        self._boards.scalars("validation", step, scalars)
        seconds = f"{values['evaluation_seconds']:.1f} s"
        say(" | ".join([f"step {step:>5}/{num_steps}", f"validation {texts[0]}", *texts[1:], seconds]))

    def event(self, values: Mapping[str, Any]) -> None:
        """Something that happened at a step, such as a spike; for metrics.jsonl alone."""
        if self._is_chief:
            self._rows.write(_finite(values))

    def rewind(self, step: int) -> None:
        """Drops the rows after a step that the run goes back to: each step is told once."""
        if self._is_chief:
            drop_rows_after(self._path, step)

    def text(self, name: str, text: str, step: int) -> None:
        """A text for TensorBoard, shown as it is."""
        if self._is_chief:
            self._boards.text(name, "    " + text.replace("\n", "\n    "), step)

    def close(self) -> None:
        if self._is_chief:
            self._boards.close()
            self._rows.close()


class Boards:
    """TensorBoard's files. Where one cannot be written a warning says so, and the run goes on without them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, Any] = {}
        with self._no_error_ends_the_run():
            for name in ("train", "validation"):
                self._writers[name] = tf.summary.create_file_writer(str(folder / name))

    def scalars(self, board: str, step: int, values: Mapping[str, float | int | None]) -> None:
        """Numbers of a step, on the board train or validation; `step` among them is left out."""
        with self._no_error_ends_the_run():
            if board in self._writers:
                with self._writers[board].as_default():
                    for name, value in values.items():
                        if name != "step" and value is not None:
                            tf.summary.scalar(name, value, step=step)
                self._writers[board].flush()

    def text(self, name: str, text: str, step: int) -> None:
        """A text, on the board train."""
        with self._no_error_ends_the_run():
            if "train" in self._writers:
                with self._writers["train"].as_default():
                    tf.summary.text(name, text, step=step)
                self._writers["train"].flush()

    def close(self) -> None:
        with self._no_error_ends_the_run():
            for writer in self._writers.values():
                writer.close()

    @contextlib.contextmanager
    def _no_error_ends_the_run(self) -> Iterator[None]:
        try:
            yield
        except tf.errors.OpError as error:
            self._writers = {}  # a file is torn now, and TensorBoard reads none of it from there on
            line = f"warning: TensorBoard's files are not written from here on: {_reason(error)}"
            print(line, file=sys.stderr, flush=True)


def _reason(error: tf.errors.OpError) -> str:
    """The one part of TensorFlow's message that is for people."""
    text = str(error).splitlines()[0]
    return text.partition("}} ")[2].partition(" [Op:")[0] or text


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    odd = {key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    return {key: None if key in odd else value for key, value in values.items()}


class Throughput:
    """Time and tokens of training alone; evaluations, samples and saves do not count."""

    def __init__(self) -> None:
        self.seconds, self.num_tokens, self.num_steps = 0.0, 0, 0

    def add(self, seconds: float, num_tokens: int, num_steps: int) -> None:
        self.seconds += seconds
        self.num_tokens += num_tokens
        self.num_steps += num_steps

    @property
    def step_seconds(self) -> float:
        return self.seconds / max(1, self.num_steps)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0


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
        """Gives the seconds since the last lap to `part`, but for those that are known to be of others; returns all."""
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
        """To be called between steps: starts and stops the profiler where it is time."""
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
            print(f"warning: the profile cannot be written: {_reason(error)}", file=sys.stderr, flush=True)


def step_line(values: Mapping[str, float | int], num_steps: int, eta_seconds: float) -> str:
    """The console line of one logged step."""
    mfu = values.get("mfu")
    parts = [
        f"step {values['step']:>5}/{num_steps}",
        f"loss {values['loss']:.4f}",
        f"lr {values['learning_rate']:.1e}",
        f"grad norm {values['grad_norm']:.2f}",
        f"{values['step_seconds'] * 1e3:.1f} ms",
        f"{values['tokens_per_second']:,.0f} tok/s",
        *([] if mfu is None else [f"mfu {mfu:.0%}"]),
        f"eta {duration(eta_seconds)}",
    ]
    return " | ".join(parts)


def matrix_peak(precision: str, gpu_names: list[str], num_workers: int = 1, num_parallel: int = 1) -> float:
    """Peak FLOP/s of matrix products: the data sheet's for known GPUs (all of them), else measured on this worker and
    taken for each: each GPU, or the cores of each worker, where `num_parallel` products run at the same time."""
    gpu = find_gpu(gpu_names[0]) if gpu_names else None
    if gpu is not None:
        return gpu.matrix_peak(precision) * len(gpu_names)
    return _measured_matrix_peak(precision, num_parallel) * (len(gpu_names) or num_workers)


def _measured_matrix_peak(precision: str, num_parallel: int, size: int = 1024, num_runs: int = 6) -> float:
    """Best of several square products on the first device, plain and under XLA; a few tenths of a second."""
    products = square_products(precision, size, num_parallel)
    return num_parallel * 2 * size**3 / min(_seconds(product) for product in products for _ in range(num_runs))


def square_products(precision: str, size: int, num_parallel: int = 1) -> list[Callable[[], object]]:
    """Functions that multiply (size, size) matrices and wait for it: plain, and under XLA; both are traced."""
    normal = [tf.random.stateless_normal([size, size], seed=(0, index)) for index in range(num_parallel)]
    matrices = [tf.cast(each, tf.as_dtype(precision)) for each in normal]
    products: list[Callable[[], object]] = []
    for jit_compile in (False, True):
        product = tf.function(
            lambda matrix: tf.reduce_sum(tf.matmul(matrix, matrix)[:1]), jit_compile=jit_compile, autograph=False
        )
        product = tf.function(partial(_sum_over, product, matrices), autograph=False)
        products.append(partial(_value, product))
        products[-1]()
    return products


def peak_memory() -> int:
    """Most bytes that this process has held at once: of its GPUs' memory, or of the machine's where it has no GPU."""
    if tf.config.list_logical_devices("GPU"):
        return peak_gpu_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_gpu_memory() -> int:
    """Most bytes that this process has held at once, over its GPUs."""
    gpus = tf.config.list_logical_devices("GPU")
    return sum(tf.config.experimental.get_memory_info(gpu.name.removeprefix("/device:"))["peak"] for gpu in gpus)


def _sum_over(product: Callable[[tf.Tensor], tf.Tensor], matrices: list[tf.Tensor]) -> tf.Tensor:
    return tf.add_n([product(matrix) for matrix in matrices])


def _value(product: Callable[[], tf.Tensor]) -> float:
    return float(product())


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started

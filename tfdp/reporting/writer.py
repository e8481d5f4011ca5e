"""The reports of a run: one writer for the console line, metrics.jsonl and TensorBoard.

step   100/2000 | loss 2.1453 | lr 6.0e-04 | grad norm 0.91 | 20.4 ms | 37,600 tok/s | mfu 41% | eta 38s
"""

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow as tf

from tfdp.reporting.rows import RowWriter, drop_rows_after
from tfdp.system.console import say
from tfdp.system.messages import duration


class MetricsWriter:
    """Writes the metrics of a run; every method does nothing on a worker that is not the chief.

    Args:
      run_dir: gets metrics.jsonl and tensorboard/.
      resumed_step: rows of later steps, which a lost process wrote after its last checkpoint, are dropped:
        each step is reported once.
      is_chief: whether this process reports.
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
        few_targets: bool = False,
    ) -> None:
        """One logged step.

        Args:
          values: the row: `step, loss, learning_rate, grad_norm, tokens_per_second, step_seconds, mfu, ...`.
          num_steps: of the run.
          eta_seconds: to its end.
          derived: numbers that follow from them, for TensorBoard alone.
          few_targets: the console tells sequences a second, as targets are a small part of what is computed.
        """
        if not self._is_chief:
            return
        self._rows.write(_finite(values))
        self._boards.scalars("train", int(values["step"]), {**values, **derived})
        say(step_line(values, num_steps, eta_seconds, few_targets))

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
        """Drops the rows after a step that the run goes back to: each step is reported once."""
        if self._is_chief:
            drop_rows_after(self._path, step)

    def text(self, name: str, text: str, step: int) -> None:
        """A text for TensorBoard, shown as it is."""
        if self._is_chief:
            self._boards.text(name, "    " + text.replace("\n", "\n    "), step)

    def exhibit(self, name: str, exhibit: str | np.ndarray, step: int) -> None:
        """A text in Markdown, or a picture, uint8 (height, width, 3), of an evaluation: for TensorBoard."""
        if self._is_chief:
            self._boards.exhibit(name, exhibit, step)

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
        """Numbers of a step, on the board train or validation; `step` among them is ignored."""
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

    def exhibit(self, name: str, exhibit: str | np.ndarray, step: int) -> None:
        """A text or a picture, on the board validation."""
        with self._no_error_ends_the_run():
            if "validation" in self._writers:
                with self._writers["validation"].as_default():
                    if isinstance(exhibit, str):
                        tf.summary.text(name, exhibit, step=step)
                    else:
                        tf.summary.image(name, exhibit[np.newaxis], step=step)
                self._writers["validation"].flush()

    def close(self) -> None:
        with self._no_error_ends_the_run():
            for writer in self._writers.values():
                writer.close()

    @contextlib.contextmanager
    def _no_error_ends_the_run(self) -> Iterator[None]:
        try:
            yield
        except tf.errors.OpError as error:
            self._writers = {}  # a file is torn now, and TensorBoard reads nothing after that point
            line = f"warning: TensorBoard's files are no longer written: {reason(error)}"
            print(line, file=sys.stderr, flush=True)


def reason(error: tf.errors.OpError) -> str:
    """The part of TensorFlow's message that is for people."""
    text = str(error).splitlines()[0]
    return text.partition("}} ")[2].partition(" [Op:")[0] or text


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    odd = {key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    return {key: None if key in odd else value for key, value in values.items()}


def step_line(values: Mapping[str, float | int], num_steps: int, eta_seconds: float, few_targets: bool = False) -> str:
    """The console line of one logged step."""
    mfu = values.get("mfu")
    speed = f"{values['tokens_per_second']:,.0f} tok/s"
    if few_targets:
        speed = f"{values['sequences_per_second']:,.1f} sequences/s"
    parts = [
        f"step {values['step']:>5}/{num_steps}",
        f"loss {values['loss']:.4f}",
        f"lr {values['learning_rate']:.1e}",
        f"grad norm {values['grad_norm']:.2f}",
        f"{values['step_seconds'] * 1e3:.1f} ms",
        speed,
        *([] if mfu is None else [f"mfu {mfu:.0%}"]),
        f"eta {duration(eta_seconds)}",
    ]
    return " | ".join(parts)

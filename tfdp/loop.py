"""The training loop, top to bottom: resume, evaluate, sample, save, stop, step, log.

It knows steps, times and files, and nothing of what is trained: a recipe hands it a `Task` of functions.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tfdp import checkpoint
from tfdp.checkpoint import AsyncSaver, Checkpoint, CheckpointFolder
from tfdp.cluster import Cluster, Watch, publish, read
from tfdp.config import CheckpointConfig, TrainingConfig, changed_keys
from tfdp.evaluation import Evaluation
from tfdp.exits import ConfigError, StopRequested, TrainingError
from tfdp.metrics import MetricsWriter, Throughput, duration, say
from tfdp.runs import RunDirectory
from tfdp.step import StepResults, TrainStep


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


@dataclass(frozen=True)
class Task:
    """What the loop needs of a recipe."""

    strategy: Any
    run: RunDirectory
    training: TrainingConfig
    checkpointing: CheckpointConfig
    identity: Mapping[str, Any]  # what a checkpoint must agree with to be resumed
    weights: checkpoint.Variables
    optimizer_state: checkpoint.Variables
    train_step: TrainStep
    batches_from: Callable[[int], Iterator[Any]]  # the batches of a step and all after it
    evaluate: Callable[[], Evaluation]
    sample: Callable[[], str] | None
    cluster: Cluster
    watch: Watch
    stop: StopSignal
    bytes_per_token: float  # of the training text
    flops_per_token: int
    matrix_peak: float  # FLOP/s of all devices together
    facts: Mapping[str, Any]  # goes into summary.json as it is
    config_yaml: str
    started: float = field(default_factory=time.monotonic)  # when the command began to work


def fit(task: Task) -> dict[str, Any]:
    """Runs a task to its last step.

    Returns:
      What summary.json holds.

    Raises:
      ConfigError: the run directory holds the checkpoints of another run.
      StopRequested: a signal asked to stop; a checkpoint is saved.
      TrainingError: a gradient was not finite; nothing of it was applied.
    """
    num_steps = task.training.steps
    folder = task.run.checkpoints(task.checkpointing.keep)
    progress = _resume(task, folder)
    if progress.step > num_steps:
        raise ConfigError(
            f"training.steps ({num_steps}) must be at least the step that {task.run.path} has reached "
            f"({progress.step}): try {progress.step}, or name another run_dir"
        )
    earlier = _begin(task, progress)
    writer = MetricsWriter(task.run.path, progress.step, task.cluster.is_chief)
    writer.text("config", task.config_yaml, progress.step)
    batches = task.batches_from(progress.step)
    task.stop.attach(task.train_step)
    with AsyncSaver(folder) as saver:
        stopped = False
        while True:
            last = progress.step >= num_steps
            due = _due(progress.step, task.training.evaluate_every) and progress.evaluated_step != progress.step
            if last or (due and not stopped):
                _evaluate(task, writer, progress)
            if last or stopped or _should_save(task, progress):
                _save(task, saver, progress, background=not (last or stopped))
            if last or stopped:
                break
            results = _advance(task, batches, progress)
            task.watch.step = progress.step
            stopped = results.stopped
            if _due(progress.step, task.training.log_every) or progress.step >= num_steps:
                _log(task, writer, progress, results)
            if results.nonfinite is not None:
                saver.wait()
                task.watch.finish_together()
                raise TrainingError(_nonfinite_message(task, folder, progress, results))
        saver.wait()
        task.watch.finish_together()
    writer.close()
    if progress.step < num_steps:
        raise StopRequested(
            f"after step {progress.step} of {num_steps}, checkpoint saved; go on with --run_dir {task.run.path}"
        )
    return _summarise(task, progress, earlier)


@dataclass
class _Progress:
    """What changes while the loop runs."""

    step: int = 0
    resumed_step: int = 0
    saved_step: int = -1
    evaluated_step: int = -1
    is_best: bool = False
    best_loss: float | None = None
    evaluation: Evaluation | None = None
    train_loss: float | None = None
    since_log: Throughput = field(default_factory=Throughput)
    total: Throughput = field(default_factory=Throughput)
    first: Throughput = field(default_factory=Throughput)  # the first call, with what it traces and compiles
    warm: bool = False  # whether the first call, which traces and compiles, is over


def _resume(task: Task, folder: CheckpointFolder) -> _Progress:
    """Restores the newest whole checkpoint of the run directory, if there is one; the chief says which."""
    newest = _load_agreed(task.cluster, folder)
    if newest is None:
        return _Progress()
    checkpoint.refuse_differences(newest.state["identity"], task.identity)
    checkpoint.restore(task.weights, newest.weights)
    checkpoint.restore(task.optimizer_state, newest.optimizer)
    if task.cluster.is_chief:
        say(f"resumed at step {newest.step} from {folder.path(newest.step)}")
    return _Progress(
        step=newest.step,
        resumed_step=newest.step,
        saved_step=newest.step,
        evaluated_step=-1 if newest.state["validation_loss"] is None else newest.step,
        best_loss=newest.state["best_validation_loss"],
        train_loss=newest.state["train_loss"],
    )


def _begin(task: Task, progress: _Progress) -> dict[str, Any]:
    """Opens the run directory for this process; returns the summary of an earlier one that had come as far."""
    if not task.cluster.is_chief:
        return {}
    run = task.run
    if progress.resumed_step and run.config_path.is_file():
        for line in changed_keys(run.config_path.read_text(encoding="utf-8"), task.config_yaml):
            say(f"changed    {line}")
    earlier = json.loads(run.summary_path.read_text(encoding="utf-8")) if run.summary_path.is_file() else {}
    run.begin(task.config_yaml)
    return earlier if earlier.get("step") == progress.step else {}


def _load_agreed(cluster: Cluster, folder: CheckpointFolder) -> Checkpoint | None:
    """The checkpoint that the chief chose, so that all workers go on from the same step."""
    if cluster.is_chief:
        try:
            newest, warnings = folder.load_newest()
        except (ConfigError, OSError):
            if cluster.num_workers > 1:
                publish("resume", 0, "refused")
            raise
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        if cluster.num_workers > 1:
            publish("resume", 0, "none" if newest is None else str(newest.step))
        return newest
    step = read("resume", 0)
    if step == "refused":
        raise ConfigError(f"{cluster.name(0)} cannot resume from {folder.folder}: its own line says why")
    return None if step == "none" else folder.load(int(step))


def _advance(task: Task, batches: Iterator[Any], progress: _Progress) -> StepResults:
    """Runs the steps up to the next event, in one call."""
    started = time.monotonic()
    events = (task.training.log_every, task.training.evaluate_every, task.checkpointing.every_steps)
    target = min([task.training.steps, *(progress.step - progress.step % n + n for n in events if n)])
    results = task.train_step(batches, progress.step, target - progress.step if progress.warm else 1)
    seconds = time.monotonic() - started
    progress.step += len(results.loss)
    if len(results.loss):
        progress.train_loss = float(results.loss[-1])
    if progress.warm:
        progress.since_log.add(seconds, int(results.num_tokens.sum()), len(results.loss))
        progress.total.add(seconds, int(results.num_tokens.sum()), len(results.loss))
    else:
        progress.first.add(seconds, int(results.num_tokens.sum()), len(results.loss))
        progress.warm = True
        if task.cluster.is_chief:
            since_start = duration(time.monotonic() - task.started)
            say(f"first step after {since_start}, of which {seconds:.1f} s to trace and compile")
    return results


def _log(task: Task, writer: MetricsWriter, progress: _Progress, results: StepResults) -> None:
    if not len(results.loss):
        return
    speed = progress.since_log if progress.since_log.num_steps else progress.first
    values = {
        "step": progress.step,
        "loss": float(results.loss[-1]),
        "learning_rate": float(results.learning_rate[-1]),
        "grad_norm": float(results.grad_norm[-1]),
        "tokens_per_second": speed.tokens_per_second,
        "step_seconds": speed.step_seconds,
        "mfu": speed.tokens_per_second * task.flops_per_token / task.matrix_peak,
        "bits_per_byte": float(results.loss[-1]) / math.log(2) / task.bytes_per_token,
        "num_tokens": int(results.num_tokens[-1]),
        "sequences_seen": progress.step * task.training.global_batch_size,
    }
    eta = (task.training.steps - progress.step) * speed.step_seconds
    writer.train(values, task.training.steps, eta)
    progress.since_log = Throughput()


def _evaluate(task: Task, writer: MetricsWriter, progress: _Progress) -> None:
    started = time.monotonic()
    progress.evaluation = task.evaluate()
    loss = progress.evaluation.loss
    if progress.evaluated_step == progress.step:  # a finished run named again: told before
        return
    progress.evaluated_step = progress.step
    progress.is_best = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
    progress.best_loss = loss if progress.is_best else progress.best_loss
    values = {
        "step": progress.step,
        "validation_loss": loss,
        "validation_bits_per_byte": progress.evaluation.bits_per_byte,
        "evaluation_seconds": time.monotonic() - started,
    }
    writer.validation(values, task.training.steps)
    if task.sample is not None:
        writer.text("sample", task.sample() if task.cluster.is_chief else "", progress.step)


def _should_save(task: Task, progress: _Progress) -> bool:
    """At every checkpoint.every_steps, and where an evaluation was the best so far."""
    if progress.step == progress.saved_step:
        return False
    is_best = progress.evaluated_step == progress.step and progress.is_best
    return is_best or _due(progress.step, task.checkpointing.every_steps)


def _save(task: Task, saver: AsyncSaver, progress: _Progress, background: bool) -> None:
    """Copies the state to host memory and has it written; only the chief has anything to do."""
    if progress.step == progress.saved_step or not task.cluster.is_chief:
        progress.saved_step = progress.step
        return
    weights, optimizer = checkpoint.snapshot(task.weights), checkpoint.snapshot(task.optimizer_state)
    evaluated = progress.evaluation if progress.evaluated_step == progress.step else None
    state = {
        "step": progress.step,
        "sequences_seen": progress.step * task.training.global_batch_size,
        "identity": dict(task.identity),
        "train_loss": progress.train_loss,
        "validation_loss": evaluated.loss if evaluated and math.isfinite(evaluated.loss) else None,
        "best_validation_loss": progress.best_loss,
    }
    saver.save(Checkpoint(weights, optimizer, state), background)
    progress.saved_step = progress.step


def _summarise(task: Task, progress: _Progress, earlier: dict[str, Any]) -> dict[str, Any]:
    weights, optimizer = checkpoint.snapshot(task.weights), checkpoint.snapshot(task.optimizer_state)
    assert progress.evaluation is not None, "the loop evaluates at its last step"
    summary = {
        "step": progress.step,
        "train_loss": progress.train_loss,
        "validation_loss": progress.evaluation.loss,
        "validation_bits_per_byte": progress.evaluation.bits_per_byte,
        "best_validation_loss": progress.best_loss,
        "tokens_per_second": progress.total.tokens_per_second,
        "wall_seconds": time.monotonic() - task.started,
        "num_replicas": int(task.strategy.num_replicas_in_sync),
        "num_workers": task.cluster.num_workers,
        "sequences_seen": progress.step * task.training.global_batch_size,
        **task.facts,
        **checkpoint.digests_of(weights, optimizer),
    }
    if not progress.total.num_steps:  # nothing was trained: the times are those of the process that did
        summary.update({key: earlier[key] for key in ("tokens_per_second", "wall_seconds") if key in earlier})
    if task.cluster.is_chief:
        task.run.write_summary(summary)
    return summary


def _nonfinite_message(task: Task, folder: CheckpointFolder, progress: _Progress, results: StepResults) -> str:
    good = (
        f"the last good checkpoint is {folder.path(progress.saved_step)}"
        if progress.saved_step > 0
        else "there is no checkpoint yet"
    )
    return (
        f"step {progress.step + 1}: the gradient of {results.nonfinite} is not finite; the update was not applied; "
        f"{good}: go on from it with a smaller optimizer.learning_rate, --run_dir {task.run.path}"
    )


def _due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every > 0 and step % every == 0 and step > 0

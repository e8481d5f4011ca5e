"""The training loop, top to bottom: resume, evaluate, sample, save, stop, step, log.

It knows steps, times and files, and nothing of what is trained: a recipe hands it a `Task` of functions.
"""

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from tfdp import checkpoint, spikes
from tfdp.checkpoint import AsyncSaver, Checkpoint, CheckpointFolder
from tfdp.cluster import Cluster, Watch
from tfdp.config import CheckpointConfig, TrainingConfig, changed_keys
from tfdp.evaluation import Evaluation
from tfdp.exits import ConfigError, StopRequested, TrainingError
from tfdp.metrics import MetricsWriter, Throughput, duration, say
from tfdp.progress import Progress, load_agreed
from tfdp.runs import RunDirectory
from tfdp.spikes import Ledger, Spike
from tfdp.step import StepResults, TrainStep
from tfdp.stopping import StopSignal


@dataclass(frozen=True)
class Task:
    """What the loop needs of a recipe."""

    run: RunDirectory
    training: TrainingConfig
    checkpointing: CheckpointConfig
    identity: Mapping[str, Any]  # what a checkpoint must agree with to be resumed
    weights: checkpoint.Variables
    optimizer_state: checkpoint.Variables
    train_step: TrainStep
    batches_from: Callable[[int, Collection[int]], Iterator[Any]]  # the batches of a step and all after it
    left_out: Collection[int]  # positions that the configuration leaves out
    row_losses: Callable[[Iterator[Any], int], tuple[np.ndarray, np.ndarray]]  # see step.RowLosses
    evaluate: Callable[[], Evaluation]
    sample: Callable[[], str] | None
    cluster: Cluster
    watch: Watch
    stop: StopSignal
    bytes_per_token: float  # of the training text
    flops_per_token: int
    matrix_peak: float  # FLOP/s of all devices together
    layout: Mapping[str, int]  # who carries this run: num_workers, num_replicas, microbatch_size
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
      TrainingError: a spike that training.on_spike does not go around, or replicas that no longer agree; the step
        that found it was not applied.
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
    batches = task.batches_from(progress.step, _left_out(task, progress))
    task.stop.attach(task.train_step)
    with AsyncSaver(folder) as saver:
        stopped = False
        if task.training.on_spike == "rollback" and progress.saved_step < 0:
            _save(task, saver, progress, background=True)  # to roll back to
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
            for spike in results.skipped:
                _tell(task, writer, progress.ledger.record(spike, "skip"), spike, "its update is left out")
            if results.disagreement is not None:
                _end(task, saver, _disagreement_message(task, folder, saver, progress, results))
            if results.spike is not None and not stopped:
                batches = _after_spike(task, folder, saver, writer, progress, results.spike)
            elif len(progress.ledger.spikes) > task.training.max_spikes:
                _save(task, saver, progress, background=False)
                _end(task, saver, _too_many_spikes(task, progress))
        saver.wait()
        task.watch.finish_together()
    writer.close()
    if progress.step < num_steps:
        raise StopRequested(
            f"after step {progress.step} of {num_steps}, checkpoint saved; go on with --run_dir {task.run.path}"
        )
    return _summarise(task, progress, earlier)


def _resume(task: Task, folder: CheckpointFolder) -> Progress:
    """Restores the newest whole checkpoint of the run directory, if there is one; the chief says which."""
    progress = Progress()
    newest = load_agreed(task.cluster, folder, "resume")
    if newest is None:
        return progress
    checkpoint.refuse_differences(newest.state["identity"], task.identity)
    progress.ledger = Ledger.from_state(newest.state.get("ledger", {}))
    _restore(task, progress, newest)
    progress.resumed_step = progress.step
    if task.cluster.is_chief:
        say(f"resumed at step {newest.step} from {folder.path(newest.step)}")
    return progress


def _restore(task: Task, progress: Progress, saved: Checkpoint) -> None:
    """Puts the run back to where a checkpoint was saved, on every replica."""
    checkpoint.restore(task.weights, saved.weights)
    checkpoint.restore(task.optimizer_state, saved.optimizer)
    state = saved.state
    task.train_step.recent_losses = spikes.recent_from_state(state.get("recent_losses", []))
    progress.step = progress.saved_step = progress.verified_step = saved.step
    progress.evaluated_step = -1 if state["validation_loss"] is None else saved.step
    progress.best_loss, progress.train_loss = state["best_validation_loss"], state["train_loss"]


def _begin(task: Task, progress: Progress) -> dict[str, Any]:
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


def _advance(task: Task, batches: Iterator[Any], progress: Progress) -> StepResults:
    """Runs the steps up to the next event, in one call."""
    started = time.monotonic()
    events = (task.training.log_every, task.training.evaluate_every, task.checkpointing.every_steps)
    target = min([task.training.steps, *(progress.step - progress.step % n + n for n in events if n)])
    results = task.train_step(batches, progress.step, target - progress.step if progress.warm else 1)
    seconds = time.monotonic() - started
    progress.verified_step = _last_multiple(task.training.verify_every, progress, len(results.loss))
    progress.step += len(results.loss)
    finite = results.loss[np.isfinite(results.loss)]
    progress.train_loss = float(finite[-1]) if len(finite) else progress.train_loss
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


def _log(task: Task, writer: MetricsWriter, progress: Progress, results: StepResults) -> None:
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
        "sequences_seen": _sequences_seen(task, progress),
    }
    eta = (task.training.steps - progress.step) * speed.step_seconds
    writer.train(values, task.training.steps, eta)
    progress.since_log = Throughput()


def _evaluate(task: Task, writer: MetricsWriter, progress: Progress) -> None:
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


def _should_save(task: Task, progress: Progress) -> bool:
    """At every checkpoint.every_steps, and where an evaluation was the best so far."""
    if progress.step == progress.saved_step:
        return False
    is_best = progress.evaluated_step == progress.step and progress.is_best
    return is_best or _due(progress.step, task.checkpointing.every_steps)


def _save(task: Task, saver: AsyncSaver, progress: Progress, background: bool) -> None:
    """Copies the state to host memory and has it written; only the chief has anything to do."""
    if progress.step == progress.saved_step or not task.cluster.is_chief:
        progress.saved_step = progress.step
        return
    weights, optimizer = checkpoint.snapshot(task.weights), checkpoint.snapshot(task.optimizer_state)
    evaluated = progress.evaluation if progress.evaluated_step == progress.step else None
    state = {
        "step": progress.step,
        "sequences_seen": _sequences_seen(task, progress),
        "identity": dict(task.identity),
        "train_loss": progress.train_loss,
        "validation_loss": evaluated.loss if evaluated and math.isfinite(evaluated.loss) else None,
        "best_validation_loss": progress.best_loss,
        "recent_losses": spikes.recent_to_state(task.train_step.recent_losses),
        "ledger": progress.ledger.to_state(),
        "layout": dict(task.layout),
    }
    saver.save(Checkpoint(weights, optimizer, state), background)
    progress.saved_step = progress.step


def _summarise(task: Task, progress: Progress, earlier: dict[str, Any]) -> dict[str, Any]:
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
        "num_replicas": task.layout["num_replicas"],
        "num_workers": task.layout["num_workers"],
        "sequences_seen": _sequences_seen(task, progress),
        **task.facts,
        **checkpoint.digests_of(weights, optimizer),
    }
    if not progress.total.num_steps:  # nothing was trained: the times are those of the process that did
        summary.update({key: earlier[key] for key in ("tokens_per_second", "wall_seconds") if key in earlier})
    if task.cluster.is_chief:
        task.run.write_summary(summary)
    return summary


# ---------------------------------------------------------------------------------------------------
# What should not happen
# ---------------------------------------------------------------------------------------------------


def _end(task: Task, saver: AsyncSaver, message: str) -> NoReturn:
    """Ends the run on all workers, which came to the same verdict."""
    saver.wait()
    task.watch.finish_together()
    raise TrainingError(message)


def _after_spike(
    task: Task, folder: CheckpointFolder, saver: AsyncSaver, writer: MetricsWriter, progress: Progress, spike: Spike
) -> Iterator[Any]:
    """Ends the run, or goes back to the newest checkpoint; returns the batches to go on with, without the offenders.

    The refused update has changed nothing, so a spike of the loss alone leaves a state that is worth a checkpoint.
    """
    if task.training.on_spike == "stop":
        if spike.tensor is None:
            _save(task, saver, progress, background=False)
        _end(task, saver, _stop_message(task, folder, progress, spike))
    if len(progress.ledger.spikes) >= task.training.max_spikes:
        _end(task, saver, _too_many_spikes(task, progress))
    offenders = _offenders(task, progress)
    if not offenders:
        _end(task, saver, f"{spike.describe()}, though its whole batch is left out; {_last_good(folder, progress)}")
    entry = progress.ledger.record(spike, "rollback", offenders)
    saver.wait()
    progress.num_rollbacks += 1
    newest = load_agreed(task.cluster, folder, f"rollback-{progress.num_rollbacks}")
    assert newest is not None, "a run that rolls back saves a checkpoint before its first step"
    _restore(task, progress, newest)
    writer.rewind(progress.step)
    listed = ", ".join(map(str, offenders))
    _tell(task, writer, entry, spike, f"back to step {progress.step}, leaving out the positions {listed}")
    return task.batches_from(progress.step, _left_out(task, progress))


def _offenders(task: Task, progress: Progress) -> list[int]:
    """Positions of the refused step's batch that stand out; all that are not left out yet where none does."""
    batches = task.batches_from(progress.step, _left_out(task, progress))
    sums, counts = task.row_losses(batches, progress.step)
    valid = np.flatnonzero(counts)
    standing_out = spikes.offending_rows(sums[valid] / counts[valid], task.training.spike_threshold)
    first = progress.step * task.training.global_batch_size
    return [first + int(row) for row in (valid[standing_out] if standing_out else valid)]


def _left_out(task: Task, progress: Progress) -> set[int]:
    return {*task.left_out, *progress.ledger.left_out}


def _tell(task: Task, writer: MetricsWriter, entry: Mapping[str, Any], spike: Spike, action: str) -> None:
    writer.event(entry)
    if task.cluster.is_chief:
        say(f"spike      {spike.describe()}; {action}")


def _stop_message(task: Task, folder: CheckpointFolder, progress: Progress, spike: Spike) -> str:
    return (
        f"{spike.describe()}; the update was not applied; {_last_good(folder, progress)}: go on from it with a smaller "
        f"optimizer.learning_rate, or --training.on_spike rollback, --run_dir {task.run.path}"
    )


def _too_many_spikes(task: Task, progress: Progress) -> str:
    return (
        f"training.max_spikes ({task.training.max_spikes}) is reached at step {progress.step}: {task.run.metrics_path} "
        f"tells each spike; try a smaller optimizer.learning_rate"
    )


def _disagreement_message(
    task: Task, folder: CheckpointFolder, saver: AsyncSaver, progress: Progress, results: StepResults
) -> str:
    """Names who disagrees, and moves the checkpoints out of the way that were saved since all agreed."""
    found = results.disagreement
    assert found is not None
    saver.wait()
    local = task.layout["num_replicas"] // task.layout["num_workers"]
    names = ", ".join(f"replica {index} of {task.cluster.name(index // local)}" for index in found.replicas)
    aside = folder.set_aside_after(progress.verified_step) if task.cluster.is_chief else []
    moved = f"; set aside, for they may be wrong: {', '.join(aside)}" if aside else ""
    who = f"{names} disagrees with the others" if found.has_majority else f"{names} disagree"
    progress.saved_step = max([step for step in folder.steps() if step <= progress.verified_step], default=0)
    return (
        f"step {progress.step + 1}: the weights of the replicas differ, first in {found.tensor}: {who}; they agreed "
        f"before step {progress.verified_step + 1}{moved}; {_last_good(folder, progress)}; a device, its memory or a "
        f"library is at fault: go on with --run_dir {task.run.path}, on other hardware if it comes back"
    )


def _last_good(folder: CheckpointFolder, progress: Progress) -> str:
    if progress.saved_step <= 0:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is {folder.path(progress.saved_step)}"


def _sequences_seen(task: Task, progress: Progress) -> int:
    """Sequences of the global order that were trained on: those up to here, without those left out."""
    positions = progress.step * task.training.global_batch_size
    return positions - sum(position < positions for position in _left_out(task, progress))


def _last_multiple(every: int, progress: Progress, num_steps: int) -> int:
    """The last step before which the replicas compared their weights, `num_steps` after the present one."""
    if every == 0 or not num_steps:
        return progress.verified_step
    last = progress.step + num_steps - 1
    return max(progress.verified_step, last - last % every)


def _due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every > 0 and step % every == 0 and step > 0

"""The training loop, top to bottom: resume, evaluate, sample, save, stop, step, log.

It knows steps, times and files, and nothing of what is trained: a recipe hands it a `Task` of functions.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from tfdp import checkpoint
from tfdp.checkpoint import CheckpointFolder
from tfdp.clock import PARTS
from tfdp.cluster import publish, read
from tfdp.config import changed_keys
from tfdp.console import say
from tfdp.estimates import duration
from tfdp.exits import ConfigError, StopRequested
from tfdp.ledger import Ledger
from tfdp.metrics import MetricsWriter, Throughput, Trace, peak_memory
from tfdp.progress import Progress, left_out, load_agreed, note_start, restore, sequences_seen
from tfdp.recovery import judge, save_verified
from tfdp.saver import AsyncSaver
from tfdp.step import StepResults
from tfdp.task import Task


def fit(task: Task) -> dict[str, Any]:
    """Runs a task to its last step.

    Returns:
      What summary.json holds.

    Raises:
      ConfigError: the run directory holds the checkpoints of another run.
      SaveFailed: a checkpoint could not be written; the step that was under way then is not applied.
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
    finished = _find_finished(task, progress)
    if finished is not None:
        task.watch.finish_together()
        return finished
    _begin(task, progress)
    writer = MetricsWriter(task.run.path, progress.step, task.cluster.is_chief)
    trace = Trace(task.training.profiled, task.run.path / "tensorboard", task.cluster.is_chief)
    writer.text("config", task.config_yaml, progress.step)
    batches = task.batches_from(progress.step, left_out(task, progress))
    task.stop.attach(task.train_step)
    with AsyncSaver(folder) as saver:
        stopped = False
        if task.training.on_spike == "rollback" and progress.saved_step < 0:
            save_verified(task, folder, saver, progress, background=True)  # to roll back to
        while True:
            last = progress.step >= num_steps
            due = _due(progress.step, task.training.evaluate_every) and progress.evaluated_step != progress.step
            progress.time.lap("host")
            if last or (due and not stopped):
                _evaluate(task, writer, progress)
                progress.time.lap("evaluation")
            if last or stopped or _should_save(task, progress):
                save_verified(task, folder, saver, progress, background=not (last or stopped))
                progress.time.lap("saving")
            trace.follow(progress.step, ends=last or stopped)
            if last or stopped:
                break
            task.run.require_held()
            saver.raise_failure()
            results = _advance(task, batches, progress)
            task.watch.step = progress.step
            stopped = results.stopped
            if _due(progress.step, task.training.log_every) or progress.step >= num_steps:
                _log(task, writer, progress, results)
            batches = judge(task, folder, saver, writer, progress, results) or batches
        saver.wait()
        task.watch.finish_together()
    writer.close()
    if progress.step < num_steps:
        raise StopRequested(
            f"after step {progress.step} of {num_steps}, checkpoint saved; go on with --run_dir {task.run.path}"
        )
    return _summarise(task, progress)


def _resume(task: Task, folder: CheckpointFolder) -> Progress:
    """Restores the newest whole checkpoint of the run directory, if there is one; the chief says which."""
    progress = Progress()
    newest = load_agreed(task.cluster, folder, "resume")
    if newest is None:
        return progress
    checkpoint.refuse_differences(newest.state["identity"], task.identity)
    progress.ledger = Ledger.from_state(newest.state.get("ledger", {}))
    progress.history = newest.state.get("history", [])
    progress.earlier_yaml = newest.state.get("config")
    if progress.earlier_yaml is None and task.run.config_path.is_file():  # a checkpoint of before it held that
        progress.earlier_yaml = task.run.config_path.read_text(encoding="utf-8")
    restore(task, progress, newest)
    progress.resumed_step = progress.step
    if task.cluster.is_chief:
        say(f"resumed at step {newest.step} from {folder.path(newest.step)}")
    return progress


def _find_finished(task: Task, progress: Progress) -> dict[str, Any] | None:
    """The summary of a run that has ended, and whose record stays as it is; None if there is something left to do."""
    if progress.resumed_step != task.training.steps:
        return None
    if not task.cluster.is_chief:
        return task.run.read_summary() if read("finished", 0) == "yes" else None
    summary = task.run.read_summary()
    weights, optimizer = checkpoint.snapshot(task.weights), checkpoint.snapshot(task.optimizer_state)
    expected = {
        "step": progress.step,
        "train_loss": progress.train_loss,
        "best_validation_loss": progress.best_loss,
        **checkpoint.digests_of(weights, optimizer),
    }
    is_finished = all(summary.get(key) == value for key, value in expected.items())
    if task.cluster.num_workers > 1:
        publish("finished", 0, "yes" if is_finished else "no")
    if not is_finished:
        return None
    changed = "; ".join(changed_keys(progress.earlier_yaml or task.config_yaml, task.config_yaml))
    say("finished   already: its record stays as it is" + (f"; without effect: {changed}" if changed else ""))
    return summary


def _begin(task: Task, progress: Progress) -> None:
    """Notes who carries the run from here on, and opens the run directory."""
    note_start(task, progress)
    if task.cluster.is_chief:
        for key, (old, new) in progress.history[-1]["changed"].items():
            say(f"changed    {key}: {old} -> {new}")
        task.run.begin(task.config_yaml, task.furnish)


def _advance(task: Task, batches: Iterator[Any], progress: Progress) -> StepResults:
    """Runs the steps up to the next event, in one call."""
    events = (task.training.log_every, task.training.evaluate_every, task.checkpointing.every_steps)
    target = min([task.training.steps, *(progress.step - progress.step % n + n for n in events if n)])
    target = min([target, *(step for step in task.training.profiled if step > progress.step)])
    progress.time.lap("host")
    results = task.train_step(batches, progress.step, target - progress.step if progress.warm else 1)
    parts = dict(zip(PARTS, results.seconds.tolist(), strict=True))
    seconds = progress.time.lap("host" if progress.warm else "compile", within=parts)
    progress.verified_step = task.train_step.last_comparison(progress.step, len(results.loss)) or progress.verified_step
    progress.step += len(results.loss)
    progress.source_losses += results.source_losses.sum(axis=0)
    progress.source_tokens += results.source_tokens.sum(axis=0)
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
        "sequences_seen": sequences_seen(task, progress),
        "reduction_bytes": task.train_step.reduction_bytes,
        "num_reductions": task.train_step.num_reductions,
        **_of_scaling(task),
        **{f"seconds/{part}": seconds for part, seconds in progress.time.seconds.items()},
        **_of_sources(task, progress),
    }
    progress.time.restart()
    eta = (task.training.steps - progress.step) * speed.step_seconds
    writer.train(values, task.training.steps, eta)
    progress.since_log = Throughput()
    progress.source_losses, progress.source_tokens = 0.0, 0


def _of_scaling(task: Task) -> dict[str, float | int]:
    """The scale of the loss and the overflows of the run so far, where it is scaled."""
    if task.training.precision != "float16":
        return {}
    scale, _, num_overflows = task.train_step.scaling.tolist()
    return {"loss_scale": scale, "num_overflows": int(num_overflows)}


def _of_sources(task: Task, progress: Progress) -> dict[str, float | int]:
    """Loss and tokens of each source since the last line, where there are several."""
    if len(task.source_names) == 1:
        return {}
    losses, tokens = np.atleast_1d(progress.source_losses), np.atleast_1d(progress.source_tokens)
    found: dict[str, float | int] = {}
    for name, loss, count in zip(task.source_names, losses, tokens, strict=True):
        found[f"loss/{name}"] = float(loss) / int(count) if count else math.nan
        found[f"num_tokens/{name}"] = int(count)
    return found


def _evaluate(task: Task, writer: MetricsWriter, progress: Progress) -> None:
    started = time.monotonic()
    progress.evaluation = task.evaluate()
    loss = progress.evaluation.loss
    if progress.evaluated_step == progress.step:  # a run that ended between its last checkpoint and summary.json
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
    for name, found in progress.evaluation.sources.items():
        values[f"validation_loss/{name}"] = found.loss
        values[f"validation_bits_per_byte/{name}"] = found.bits_per_byte
    writer.validation(values, task.training.steps)
    if task.sample is not None:
        writer.text("sample", task.sample() if task.cluster.is_chief else "", progress.step)


def _should_save(task: Task, progress: Progress) -> bool:
    """At every checkpoint.every_steps, and where an evaluation was the best so far."""
    if progress.step == progress.saved_step:
        return False
    is_best = progress.evaluated_step == progress.step and progress.is_best
    return is_best or _due(progress.step, task.checkpointing.every_steps)


def _summarise(task: Task, progress: Progress) -> dict[str, Any]:
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
        "peak_memory_bytes": peak_memory(),
        "num_replicas": task.layout["num_replicas"],
        "num_workers": task.layout["num_workers"],
        "sequences_seen": sequences_seen(task, progress),
        **{f"seconds/{part}": seconds for part, seconds in progress.time.total.items()},
        **task.facts,
        **checkpoint.digests_of(weights, optimizer),
        "history": progress.history,
    }
    if task.cluster.is_chief:
        task.run.write_summary(summary)
    return summary


def _due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every > 0 and step % every == 0 and step > 0

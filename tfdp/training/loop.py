"""The training loop, top to bottom: resume, evaluate, sample, save, stop, step, log.

It knows steps, times and files, but not what is trained: `assembly.py` gives it a `Run` of functions.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tfdp.config.run_config import changed_keys, standard_defaults
from tfdp.parallel.cluster import publish, read
from tfdp.reporting.hardware import peak_memory
from tfdp.reporting.timing import Throughput, Trace
from tfdp.reporting.writer import MetricsWriter
from tfdp.system.console import say
from tfdp.system.exits import ConfigError, StopRequested
from tfdp.system.messages import duration
from tfdp.tasks.task import named_metrics
from tfdp.training.checkpoint import CheckpointFolder
from tfdp.training.ending import STEPS, TimeLimit, describe, reason_to_end
from tfdp.training.ledger import Ledger
from tfdp.training.progress import (
    Progress,
    excluded_positions,
    load_agreed,
    note_start,
    restore,
    run_seconds,
    sequences_seen,
)
from tfdp.training.recovery import handle_anomalies, save_verified
from tfdp.training.run import Run
from tfdp.training.saver import AsyncSaver
from tfdp.training.step_statistics import StepResults
from tfdp.training.weights import refuse_differences


def fit(run: Run) -> dict[str, Any]:
    """Trains to the last step, or until its patience or its time ends the run.

    Returns:
      What summary.json holds.

    Raises:
      ConfigError: the run directory holds the checkpoints of another run.
      SaveFailed: a checkpoint could not be written; the step that was running then is not applied.
      StopRequested: a signal asked to stop; a checkpoint is saved.
      TrainingError: a spike that training.on_spike does not recover from, or replicas that no longer agree; the
        step that found it was not applied.
    """
    folder = run.directory.checkpoints(run.checkpointing.keep)
    progress = _resume(run, folder)
    finished = _find_finished(run, progress)
    if finished is not None:
        run.watch.finish_together()
        return finished
    _begin(run, progress)
    writer = MetricsWriter(run.directory.path, progress.step, run.cluster.is_chief)
    trace = Trace(run.training.profiled, run.directory.path / "tensorboard", run.cluster.is_chief)
    writer.text("config", run.config_yaml, progress.step)
    batches = run.batches_from(progress.step, excluded_positions(run, progress))
    run.stop.attach(run.train_step)
    with AsyncSaver(folder) as saver, _time_limit(run, progress):
        stopped = False
        if run.training.on_spike == "rollback" and progress.saved_step < 0:
            save_verified(run, folder, saver, progress, background=True)  # to roll back to
        while True:
            progress.ended_by = _reason_to_end(run, progress)
            due = _due(run, progress.step, run.training.evaluate_every) and progress.evaluated_step != progress.step
            progress.time.lap("host")
            if progress.ended_by or (due and not stopped):
                _evaluate(run, writer, progress)
                progress.ended_by = progress.ended_by or _reason_to_end(run, progress)
                progress.time.lap("evaluation")
            ends = stopped or progress.ended_by is not None
            if ends or _should_save(run, progress):
                save_verified(run, folder, saver, progress, background=not ends)
                progress.time.lap("saving")
            trace.follow(progress.step, ends)
            if ends:
                break
            run.directory.require_held()
            saver.raise_failure()
            results = _advance(run, batches, progress)
            run.watch.step = progress.step
            stopped = results.stopped
            if _due(run, progress.step, run.training.log_every) or _reason_to_end(run, progress):
                _log(run, writer, progress, results)
            batches = handle_anomalies(run, folder, saver, writer, progress, results) or batches
        saver.wait()
        run.watch.finish_together()
    writer.close()
    _say_why(run, progress)
    return _summarise(run, progress)


def _say_why(run: Run, progress: Progress) -> None:
    """Says what ended the run before its last step; raises `StopRequested` where that was a signal."""
    if progress.ended_by is None:
        where = f"after step {progress.step} of {run.training.steps}"
        raise StopRequested(f"{where}, checkpoint saved; resume with --run_dir {run.directory.path}")
    if run.cluster.is_chief and progress.ended_by != STEPS:
        say(f"ended      {describe(progress.ended_by, run.training, progress.step, run.task.best)}")


def _time_limit(run: Run, progress: Progress) -> TimeLimit:
    """Asks the steps to end once the time of the run is up: on the chief, for all workers."""
    seconds = run.training.max_seconds if run.cluster.is_chief else None
    deadline = None if seconds is None else run.started + seconds - progress.earlier_seconds
    return TimeLimit(deadline, run.train_step.request_end)


def _reason_to_end(run: Run, progress: Progress) -> str | None:
    """The key that ends the run here. The clock of this process does not count: other workers have other clocks."""
    seconds = math.inf if progress.time_is_up else progress.earlier_seconds
    return reason_to_end(run.training, progress.step, progress.num_not_better, seconds)


def _resume(run: Run, folder: CheckpointFolder) -> Progress:
    """Restores the newest whole checkpoint of the run directory, if there is one; the chief says which."""
    progress = Progress()
    newest = load_agreed(run.cluster, folder, "resume")
    if newest is None:
        return progress
    wanted = json.loads(json.dumps(run.identity))  # as state.json has it: a list is no tuple
    refuse_differences({**{key: standard_defaults().get(key) for key in wanted}, **newest.state["identity"]}, wanted)
    progress.ledger = Ledger.from_state(newest.state.get("ledger", {}))
    progress.history = newest.state.get("history", [])
    progress.earlier_seconds = newest.state.get("seconds", 0.0)
    progress.earlier_yaml = newest.state.get("config")
    if progress.earlier_yaml is None and run.directory.config_path.is_file():  # an earlier checkpoint, which lacks it
        progress.earlier_yaml = run.directory.config_path.read_text(encoding="utf-8")
    restore(run, progress, newest)
    if progress.step > run.training.steps:
        raise ConfigError(
            f"training.steps ({run.training.steps}) must be at least the step that {run.directory.path} has reached "
            f"({progress.step}): try {progress.step}, or name another run_dir"
        )
    progress.resumed_step = progress.step
    if run.cluster.is_chief:
        say(f"resumed at step {newest.step} from {folder.path(newest.step)}")
    return progress


def _find_finished(run: Run, progress: Progress) -> dict[str, Any] | None:
    """The summary of a run that has finished: its record stays as it is. None if there is something left to do."""
    if progress.saved_step < 0:
        return None
    if not run.cluster.is_chief:
        return run.directory.read_summary() if read("finished", 0) == "yes" else None
    summary = run.directory.read_summary()
    is_finished = _is_record(run, progress, summary)
    if run.cluster.num_workers > 1:
        publish("finished", 0, "yes" if is_finished else "no")
    if not is_finished:
        return None
    changed = "; ".join(changed_keys(progress.earlier_yaml or run.config_yaml, run.config_yaml))
    say("finished   already: its record stays as it is" + (f"; without effect: {changed}" if changed else ""))
    return summary


def _is_record(run: Run, progress: Progress, summary: Mapping[str, Any]) -> bool:
    """Whether a summary is that of the restored checkpoint, and the keys as they are now would end the run there."""
    num_not_better, seconds = summary.get("evaluations_not_better", 0), summary.get("run_seconds", 0.0)
    if reason_to_end(run.training, progress.step, num_not_better, seconds) is None:
        return False
    best = f"best_validation_{run.task.best}"
    # Stopped at this step, resumed, evaluated and ended: then the checkpoint of the step is from before the evaluation.
    value = progress.best_value if progress.evaluated_step == progress.step else summary.get(best)
    expected = {"step": progress.step, "train_loss": progress.train_loss, best: value, **run.weights.digests()}
    return all(key in summary and summary[key] == value for key, value in expected.items())


def _begin(run: Run, progress: Progress) -> None:
    """Records this process in the history, and opens the run directory."""
    note_start(run, progress)
    if run.cluster.is_chief:
        for key, (old, new) in progress.history[-1]["changed"].items():
            say(f"changed    {key}: {old} -> {new}")
        run.directory.begin(run.config_yaml, run.save_assets)


def _advance(run: Run, batches: Iterator[Any], progress: Progress) -> StepResults:
    """Runs the steps up to the next event, in one call."""
    events = (run.training.log_every, run.training.evaluate_every, run.checkpointing.every_steps)
    target = min([run.training.steps, *(progress.step - progress.step % n + n for n in events if n)])
    target = min([target, *(step for step in run.training.profiled if step > progress.step)])
    target = run.train_step.boundary(target if progress.warm else progress.step + 1)
    progress.time.lap("host")
    results = run.train_step(batches, progress.step, target - progress.step)
    parts = dict(zip(run.train_step.phases, results.seconds.tolist(), strict=True))
    seconds = progress.time.lap("host" if progress.warm else "compile", within=parts)
    progress.verified_step = run.train_step.last_comparison(progress.step, len(results.loss)) or progress.verified_step
    progress.step += len(results.loss)
    progress.time_is_up = progress.time_is_up or results.time_is_up
    progress.source_losses += results.source_losses.sum(axis=0)
    progress.source_tokens += results.source_tokens.sum(axis=0)
    finite = results.loss[np.isfinite(results.loss)]
    progress.train_loss = float(finite[-1]) if len(finite) else progress.train_loss
    num_steps, num_tokens = len(results.loss), int(results.num_tokens.sum())
    for speed in (progress.since_log, progress.total) if progress.warm else (progress.first,):
        speed.add(seconds, num_tokens, num_steps, num_steps * run.training.global_batch_size)
    if not progress.warm:
        progress.warm = True
        if run.cluster.is_chief:
            since_start = duration(time.monotonic() - run.started)
            say(f"first step after {since_start}, of which {seconds:.1f} s to trace and compile")
    return results


def _log(run: Run, writer: MetricsWriter, progress: Progress, results: StepResults) -> None:
    if not len(results.loss):
        return
    speed = progress.since_log if progress.since_log.num_steps else progress.first
    loss, computed = float(results.loss[-1]), speed.computed_tokens_per_second(run.tokens_per_sequence)
    metrics = named_metrics(run.task, {"loss": loss, "targets": 1, "bytes": run.bytes_per_token})
    values = {
        "step": progress.step,
        "loss": loss,
        "learning_rate": float(results.learning_rate[-1]),
        "grad_norm": float(results.grad_norm[-1]),
        "tokens_per_second": speed.tokens_per_second,
        "sequences_per_second": speed.sequences_per_second,
        "step_seconds": speed.step_seconds,
        "mfu": computed * run.flops_per_token / run.matrix_peak,
        **{name: metric.value for name, metric in metrics.items() if metric.is_recorded and name != "loss"},
        "num_tokens": int(results.num_tokens[-1]),
        "sequences_seen": sequences_seen(run, progress),
        "reduction_bytes": run.train_step.reduction_bytes,
        "num_reductions": run.train_step.num_reductions,
        **run.train_step.metrics(),
        **{f"seconds/{part}": seconds for part, seconds in progress.time.seconds.items()},
        **_of_sources(run, progress),
    }
    progress.time.restart()
    eta = (run.training.steps - progress.step) * speed.step_seconds
    derived = {name: metric.value for name, metric in metrics.items() if not metric.is_recorded}
    writer.train(values, run.training.steps, eta, derived, few_targets=speed.tokens_per_second < computed / 2)
    progress.since_log = Throughput()
    progress.source_losses, progress.source_tokens = 0.0, 0


def _of_sources(run: Run, progress: Progress) -> dict[str, float | int]:
    """Loss and tokens of each source since the last line, where there are several."""
    if len(run.source_names) == 1:
        return {}
    losses, tokens = np.atleast_1d(progress.source_losses), np.atleast_1d(progress.source_tokens)
    found: dict[str, float | int] = {}
    for name, loss, count in zip(run.source_names, losses, tokens, strict=True):
        found[f"loss/{name}"] = float(loss) / int(count) if count else math.nan
        found[f"num_tokens/{name}"] = int(count)
    return found


def _evaluate(run: Run, writer: MetricsWriter, progress: Progress) -> None:
    """Evaluates and samples the model as it would be used: with the average of its weights, if there is one."""
    with run.averaging():
        _evaluate_as_it_is(run, writer, progress)


def _evaluate_as_it_is(run: Run, writer: MetricsWriter, progress: Progress) -> None:
    started = time.monotonic()
    progress.evaluation = run.evaluate()
    value, lowest = progress.evaluation.metrics[run.task.best].value, run.task.best_is_lowest
    if progress.evaluated_step == progress.step:  # a run that ended between its last checkpoint and summary.json
        return
    progress.evaluated_step = progress.step
    best = progress.best_value
    progress.is_best = math.isfinite(value) and (best is None or (value < best if lowest else value > best))
    progress.best_value = value if progress.is_best else best
    progress.num_not_better = 0 if progress.is_best else progress.num_not_better + 1
    values = {
        "step": progress.step,
        **{f"validation_{name}": number for name, number in progress.evaluation.recorded().items()},
        "evaluation_seconds": time.monotonic() - started,
    }
    metrics = progress.evaluation.metrics
    scalars = {name: metric.value for name, metric in metrics.items()}
    for of_set, found in progress.evaluation.sets.items():
        for name, number in found.recorded().items():
            values[f"validation_{name}/{of_set}"] = scalars[f"{name}/{of_set}"] = number
    writer.validation(values, run.training.steps, scalars, [metric.text for metric in metrics.values() if metric.text])
    for name, exhibit in progress.evaluation.exhibits.items():
        writer.exhibit(name, exhibit, progress.step)
    if run.sample is not None:
        writer.text("sample", run.sample() if run.cluster.is_chief else "", progress.step)


def _should_save(run: Run, progress: Progress) -> bool:
    """At every checkpoint.every_steps, and where an evaluation was the best so far."""
    if progress.step == progress.saved_step:
        return False
    is_best = progress.evaluated_step == progress.step and progress.is_best
    return is_best or _due(run, progress.step, run.checkpointing.every_steps)


def _summarise(run: Run, progress: Progress) -> dict[str, Any]:
    assert progress.evaluation is not None and progress.ended_by is not None, "the loop evaluates at its end"
    run.train_step.collect()
    summary = {
        "step": progress.step,
        "ended_by": progress.ended_by,
        "train_loss": progress.train_loss,
        **{f"validation_{name}": value for name, value in progress.evaluation.recorded().items()},
        f"best_validation_{run.task.best}": progress.best_value,
        "evaluations_not_better": progress.num_not_better,
        "tokens_per_second": progress.total.tokens_per_second,
        "sequences_per_second": progress.total.sequences_per_second,
        "wall_seconds": time.monotonic() - run.started,
        "run_seconds": run_seconds(run, progress),
        "peak_memory_bytes": peak_memory(),
        "num_replicas": run.layout["num_replicas"],
        "num_workers": run.layout["num_workers"],
        "sequences_seen": sequences_seen(run, progress),
        **{f"seconds/{part}": seconds for part, seconds in progress.time.total.items()},
        **run.facts,
        **run.weights.digests(),
        "history": progress.history,
    }
    if run.cluster.is_chief:
        run.directory.write_summary(summary)
    return summary


def _due(run: Run, step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one: then, or as soon as it can."""
    last = step - step % every if every else 0
    return last > 0 and run.train_step.boundary(last) == step

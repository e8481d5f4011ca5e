"""What a run does when something should not have happened: a spike, or replicas that no longer agree.

Every worker sees the same reduced numbers, so all of them come to the same decision, without another word.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from tfdp import spikes
from tfdp.checkpoint import CheckpointFolder
from tfdp.console import say
from tfdp.exits import TrainingError
from tfdp.ledger import Spike
from tfdp.metrics import MetricsWriter
from tfdp.progress import Progress, left_out, load_agreed, restore, save
from tfdp.saver import AsyncSaver
from tfdp.sentinel import Disagreement
from tfdp.step import StepResults
from tfdp.task import Task


def judge(
    task: Task,
    folder: CheckpointFolder,
    saver: AsyncSaver,
    writer: MetricsWriter,
    progress: Progress,
    results: StepResults,
) -> Iterator[Any] | None:
    """Looks at what the steps refused.

    Returns:
      The batches to go on with, if not those at hand.

    Raises:
      TrainingError: the run cannot go on, or shall not.
    """
    for spike in results.skipped:
        _tell(task, writer, progress.ledger.record(spike, "skip"), spike, "its update is left out")
    if results.disagreement is not None:
        _end(task, saver, _disagreement_message(task, folder, progress, results.disagreement, progress.step + 1))
    if results.spike is not None and not results.stopped:
        return _after_spike(task, folder, saver, writer, progress, results.spike)
    if len(progress.ledger.spikes) > task.training.max_spikes:
        save_verified(task, folder, saver, progress, background=False)
        _end(task, saver, _too_many_spikes(task, progress))
    return None


def save_verified(
    task: Task, folder: CheckpointFolder, saver: AsyncSaver, progress: Progress, background: bool
) -> None:
    """Saves a checkpoint of what all replicas hold; raises `TrainingError` where that is not the same."""
    if progress.step == progress.saved_step:
        return
    found = task.train_step.verify()
    if found is not None:
        _end(task, saver, _disagreement_message(task, folder, progress, found, progress.step))
    progress.verified_step = progress.step
    save(task, saver, progress, background)


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
            save_verified(task, folder, saver, progress, background=False)
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
    restore(task, progress, newest)
    writer.rewind(progress.step)
    listed = ", ".join(map(str, offenders))
    _tell(task, writer, entry, spike, f"back to step {progress.step}, leaving out the positions {listed}")
    return task.batches_from(progress.step, left_out(task, progress))


def _offenders(task: Task, progress: Progress) -> list[int]:
    """Positions of the refused step's batch that stand out; all that are not left out yet where none does."""
    batches = task.batches_from(progress.step, left_out(task, progress))
    sums, counts = task.row_losses(batches, progress.step)
    valid = np.flatnonzero(counts)
    standing_out = spikes.offending_rows(sums[valid] / counts[valid], task.training.spike_threshold)
    first = progress.step * task.training.global_batch_size
    return [first + int(row) for row in (valid[standing_out] if standing_out else valid)]


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
    task: Task, folder: CheckpointFolder, progress: Progress, found: Disagreement, step: int
) -> str:
    """Names who disagrees. Every checkpoint was compared before it was saved, so the newest one is good."""
    local, several = task.layout["num_replicas"] // task.layout["num_workers"], task.cluster.num_workers > 1
    places = [f" on {task.cluster.name(index // local)}" if several else "" for index in found.replicas]
    names = ", ".join(f"replica {index}{place}" for index, place in zip(found.replicas, places, strict=True))
    who = f"{names} disagrees with the others" if found.has_majority else f"{names} disagree"
    return (
        f"step {step}: the replicas no longer hold the same, first in {found.tensor}: {who}; they agreed after step "
        f"{progress.verified_step}; {_last_good(folder, progress)}; a device, its memory or a library is at fault: go "
        f"on with --run_dir {task.run.path}, on other hardware if it comes back"
    )


def _last_good(folder: CheckpointFolder, progress: Progress) -> str:
    if progress.saved_step < 0:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is {folder.path(progress.saved_step)}"

"""What a run does about an anomaly: a spike, or replicas that no longer agree.

Every worker sees the same reduced numbers, so all of them make the same decision without further messages.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from tfdp.parallel.consistency import Disagreement
from tfdp.reporting.writer import MetricsWriter
from tfdp.system.console import say
from tfdp.system.exits import TrainingError
from tfdp.training import spikes
from tfdp.training.checkpoint import CheckpointFolder
from tfdp.training.ledger import Spike
from tfdp.training.progress import Progress, excluded_positions, load_agreed, restore, save
from tfdp.training.run import Run
from tfdp.training.saver import AsyncSaver
from tfdp.training.step_statistics import StepResults


def handle_anomalies(
    run: Run,
    folder: CheckpointFolder,
    saver: AsyncSaver,
    writer: MetricsWriter,
    progress: Progress,
    results: StepResults,
) -> Iterator[Any] | None:
    """Records the updates that the steps refused, and goes back or ends the run where the configuration says so.

    Returns:
      The batches to continue with; None: those that are running.

    Raises:
      TrainingError: the run cannot continue, or must not.
    """
    for spike in results.skipped:
        _report(run, writer, progress.ledger.record(spike, "skip"), spike, "its update is skipped")
    if results.disagreement is not None:
        _end(run, saver, _disagreement_message(run, folder, progress, results.disagreement, progress.step + 1))
    if results.spike is not None and not results.stopped:
        return _after_spike(run, folder, saver, writer, progress, results.spike)
    if len(progress.ledger.spikes) > run.training.max_spikes:
        save_verified(run, folder, saver, progress, background=False)
        _end(run, saver, _too_many_spikes(run, progress))
    return None


def save_verified(run: Run, folder: CheckpointFolder, saver: AsyncSaver, progress: Progress, background: bool) -> None:
    """Saves a checkpoint of what all replicas hold; raises `TrainingError` where that is not the same."""
    if progress.step == progress.saved_step:
        return
    found = run.train_step.verify(progress.step)
    if found is not None:
        _end(run, saver, _disagreement_message(run, folder, progress, found, progress.step))
    progress.verified_step = progress.step
    save(run, saver, progress, background)


def _end(run: Run, saver: AsyncSaver, message: str) -> NoReturn:
    """Ends the run on all workers, which have made the same decision."""
    saver.wait()
    run.watch.finish_together()
    raise TrainingError(message)


def _after_spike(
    run: Run, folder: CheckpointFolder, saver: AsyncSaver, writer: MetricsWriter, progress: Progress, spike: Spike
) -> Iterator[Any]:
    """Ends the run, or goes back to the newest checkpoint; returns the batches to continue with, without the offenders.

    The refused update changed nothing, so after a spike of the loss alone the state is worth a checkpoint.
    """
    if run.training.on_spike == "stop":
        if spike.tensor is None:
            save_verified(run, folder, saver, progress, background=False)
        _end(run, saver, _stop_message(run, folder, progress, spike))
    if len(progress.ledger.spikes) >= run.training.max_spikes:
        _end(run, saver, _too_many_spikes(run, progress))
    offenders = _offenders(run, progress)
    if not offenders:
        _end(run, saver, f"{spike.describe()}, though its whole batch is excluded; {_last_good(folder, progress)}")
    entry = progress.ledger.record(spike, "rollback", offenders)
    saver.wait()
    progress.num_rollbacks += 1
    newest = load_agreed(run.cluster, folder, f"rollback-{progress.num_rollbacks}")
    assert newest is not None, "a run that rolls back saves a checkpoint before its first step"
    restore(run, progress, newest)
    writer.rewind(progress.step)
    listed = ", ".join(map(str, offenders))
    _report(run, writer, entry, spike, f"back to step {progress.step}, excluding the positions {listed}")
    return run.batches_from(progress.step, excluded_positions(run, progress))


def _offenders(run: Run, progress: Progress) -> list[int]:
    """Positions of the refused step's batch that stand out; all that are not excluded yet where none does."""
    batches = run.batches_from(progress.step, excluded_positions(run, progress))
    sums, counts = run.row_losses(batches, progress.step)
    valid = np.flatnonzero(counts)
    standing_out = spikes.offending_rows(sums[valid] / counts[valid], run.training.spike_threshold)
    first = progress.step * run.training.global_batch_size
    return [first + int(row) for row in (valid[standing_out] if standing_out else valid)]


def _report(run: Run, writer: MetricsWriter, entry: Mapping[str, Any], spike: Spike, action: str) -> None:
    writer.event(entry)
    if run.cluster.is_chief:
        say(f"spike      {spike.describe()}; {action}")


def _stop_message(run: Run, folder: CheckpointFolder, progress: Progress, spike: Spike) -> str:
    return (
        f"{spike.describe()}; the update was not applied; {_last_good(folder, progress)}: resume from it with a "
        f"smaller optimizer.learning_rate, or --training.on_spike rollback, --run_dir {run.directory.path}"
    )


def _too_many_spikes(run: Run, progress: Progress) -> str:
    return (
        f"training.max_spikes ({run.training.max_spikes}) is reached at step {progress.step}: "
        f"{run.directory.metrics_path} lists each spike; try a smaller optimizer.learning_rate"
    )


def _disagreement_message(
    run: Run, folder: CheckpointFolder, progress: Progress, found: Disagreement, step: int
) -> str:
    """Names who disagrees. Every checkpoint was compared before it was saved, so the newest one is good."""
    local, several = run.layout["num_replicas"] // run.layout["num_workers"], run.cluster.num_workers > 1
    places = [f" on {run.cluster.name(index // local)}" if several else "" for index in found.replicas]
    names = ", ".join(f"replica {index}{place}" for index, place in zip(found.replicas, places, strict=True))
    who = f"{names} disagrees with the others" if found.has_majority else f"{names} disagree"
    return (
        f"step {step}: the replicas no longer hold the same values, first in {found.tensor}: {who}; they agreed after "
        f"step {progress.verified_step}; {_last_good(folder, progress)}; a device, its memory or a library is to "
        f"blame: resume with --run_dir {run.directory.path}, on other hardware if it happens again"
    )


def _last_good(folder: CheckpointFolder, progress: Progress) -> str:
    if progress.saved_step < 0:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is {folder.path(progress.saved_step)}"

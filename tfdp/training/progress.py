"""The state of a run, and how a checkpoint saves and restores it."""

import math
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from tfdp.config.run_config import differing_keys
from tfdp.parallel.cluster import Cluster, publish, read
from tfdp.reporting.timing import Attribution, Throughput
from tfdp.system.exits import CommandError, ConfigError
from tfdp.system.version import VERSION
from tfdp.training.checkpoint import FROZEN, Checkpoint, CheckpointFolder
from tfdp.training.evaluation import Evaluation
from tfdp.training.ledger import Ledger
from tfdp.training.run import Run
from tfdp.training.saver import AsyncSaver
from tfdp.training.weights import snapshot


@dataclass
class Progress:
    """What changes while the loop runs."""

    step: int = 0
    resumed_step: int = 0
    saved_step: int = -1
    verified_step: int = 0  # up to here all replicas held the same weights
    evaluated_step: int = -1
    is_best: bool = False
    best_value: float | None = None  # of the metric that the task compares checkpoints by
    num_not_better: int = 0  # evaluations in a row that were not the best
    earlier_seconds: float = 0.0  # of the run, in the processes before this one
    time_is_up: bool = False  # as all workers agree
    ended_by: str | None = None  # the key that ended the run: see `ending`
    evaluation: Evaluation | None = None
    train_loss: float | None = None
    ledger: Ledger = field(default_factory=Ledger)
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry for each process that ran it: see note_start
    earlier_yaml: str | None = None  # the configuration of the process before this one
    frozen_sha256: str | None = None  # of the frozen weights, once they are saved
    num_rollbacks: int = 0  # of this process
    source_losses: np.ndarray | float = 0.0  # of each source since the last line, summed over its tokens
    source_tokens: np.ndarray | int = 0
    since_log: Throughput = field(default_factory=Throughput)
    total: Throughput = field(default_factory=Throughput)
    first: Throughput = field(default_factory=Throughput)  # the first call, with what it traces and compiles
    time: Attribution = field(default_factory=Attribution)
    warm: bool = False  # whether the first call, which traces and compiles, is over


def load_agreed(cluster: Cluster, folder: CheckpointFolder, occasion: str) -> Checkpoint | None:
    """The newest whole checkpoint, as the chief sees it, so that all workers resume from the same step.

    Args:
      cluster: the workers.
      folder: that all of them can read.
      occasion: a name that all workers use for this choice, and never again.

    Raises:
      ConfigError: there are checkpoints and none is whole.
    """
    if cluster.is_chief:
        try:
            newest, warnings = folder.load_newest()
        except CommandError:
            if cluster.num_workers > 1:
                publish(occasion, 0, "refused")
            raise
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        if cluster.num_workers > 1:
            publish(occasion, 0, "none" if newest is None else str(newest.step))
        return newest
    step = read(occasion, 0)
    if step == "refused":
        raise ConfigError(f"{cluster.name(0)} cannot resume from {folder.folder}: its own line says why")
    return None if step == "none" else folder.load(int(step))


def note_start(run: Run, progress: Progress) -> None:
    """Adds an entry to the history: the step from which this process runs, and the keys that changed there.

    The history is part of each checkpoint, so it covers the steps that the checkpoint covers, and no others: what a
    process did after its last checkpoint is void.
    """
    earlier = run.config_yaml if progress.earlier_yaml is None else progress.earlier_yaml
    entry = {
        "from_step": progress.step,
        "changed": {key: list(values) for key, values in differing_keys(earlier, run.config_yaml).items()},
        "version": VERSION,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "layout": dict(run.layout),
    }
    progress.history.append(entry)


def restore(run: Run, progress: Progress, saved: Checkpoint) -> None:
    """Restores a checkpoint on every replica."""
    run.weights.restore(saved.weights, saved.optimizer, saved.frozen, saved.average)
    state = saved.state
    progress.frozen_sha256 = state.get(FROZEN)
    run.train_step.load_state(state)
    progress.step = progress.saved_step = progress.verified_step = saved.step
    compared = f"validation_{run.task.best}"  # the metric may have changed: then there is no best value yet
    is_evaluated = compared in state and state.get("evaluated", state[compared] is not None)
    progress.evaluated_step = saved.step if is_evaluated else -1
    progress.num_not_better = state.get("evaluations_not_better", 0) if compared in state else 0
    progress.best_value, progress.train_loss = state.get(f"best_{compared}"), state["train_loss"]
    for entry in progress.history:  # of this process, after a rollback beyond the step it began with
        entry["from_step"] = min(entry["from_step"], progress.step)


def save(run: Run, saver: AsyncSaver, progress: Progress, background: bool) -> None:
    """Copies the state to host memory and hands it to the saver; on the chief only."""
    assert not run.averaging.is_on, "a checkpoint holds the weights, not their average in their place"
    if progress.step != progress.saved_step:
        run.train_step.collect()
    if progress.step == progress.saved_step or not run.cluster.is_chief:
        progress.saved_step = progress.step
        return
    if run.weights.frozen and progress.frozen_sha256 is None:
        progress.frozen_sha256 = saver.folder.save_frozen(snapshot(run.weights.frozen))
    trainable, optimizer = run.weights.snapshot()
    compared, value, is_evaluated = f"validation_{run.task.best}", None, progress.evaluated_step == progress.step
    if progress.evaluation is not None and is_evaluated:
        value = progress.evaluation.metrics[run.task.best].value
    state = {
        "step": progress.step,
        "sequences_seen": sequences_seen(run, progress),
        "identity": dict(run.identity),
        "train_loss": progress.train_loss,
        compared: value if value is not None and math.isfinite(value) else None,
        f"best_{compared}": progress.best_value,
        "best_by": [compared, 1 if run.task.best_is_lowest else -1],
        "evaluated": is_evaluated,
        "evaluations_not_better": progress.num_not_better,
        "seconds": run_seconds(run, progress),
        **run.train_step.to_state(),
        "ledger": progress.ledger.to_state(),
        "layout": dict(run.layout),
        "config": run.config_yaml,
        "history": [dict(entry) for entry in progress.history],
        **({} if progress.frozen_sha256 is None else {FROZEN: progress.frozen_sha256}),
    }
    saver.save(Checkpoint(trainable, optimizer, state, average=snapshot(run.weights.average)), background)
    progress.saved_step = progress.step


def run_seconds(run: Run, progress: Progress) -> float:
    """Seconds of the run, over all its starts; those after the last checkpoint of a process that died are lost."""
    return progress.earlier_seconds + time.monotonic() - run.started


def excluded_positions(run: Run, progress: Progress) -> set[int]:
    """Positions that nothing is learned from: by the configuration, and since by spikes."""
    return {*run.excluded_positions, *progress.ledger.excluded_positions}


def sequences_seen(run: Run, progress: Progress) -> int:
    """Sequences of the global order that were trained on: those up to here, without those left out."""
    positions = progress.step * run.training.global_batch_size
    return positions - sum(position < positions for position in excluded_positions(run, progress))

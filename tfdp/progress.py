"""Where a run stands, and how that goes into a checkpoint and comes out of one."""

import math
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from tfdp import __version__, checkpoint
from tfdp.checkpoint import Checkpoint, CheckpointFolder
from tfdp.cluster import Cluster, publish, read
from tfdp.config import differing_keys
from tfdp.evaluation import Evaluation
from tfdp.exits import CommandError, ConfigError
from tfdp.ledger import Ledger
from tfdp.metrics import Attribution, Throughput
from tfdp.saver import AsyncSaver
from tfdp.task import Task


@dataclass
class Progress:
    """What changes while the loop runs."""

    step: int = 0
    resumed_step: int = 0
    saved_step: int = -1
    verified_step: int = 0  # up to here all replicas held the same weights
    evaluated_step: int = -1
    is_best: bool = False
    best_loss: float | None = None
    evaluation: Evaluation | None = None
    train_loss: float | None = None
    ledger: Ledger = field(default_factory=Ledger)
    history: list[dict[str, Any]] = field(default_factory=list)  # the processes that carried the run: see note_start
    earlier_yaml: str | None = None  # the configuration of the process before this one
    num_rollbacks: int = 0  # of this process
    source_losses: np.ndarray | float = 0.0  # of each source since the last line, summed over its tokens
    source_tokens: np.ndarray | int = 0
    since_log: Throughput = field(default_factory=Throughput)
    total: Throughput = field(default_factory=Throughput)
    first: Throughput = field(default_factory=Throughput)  # the first call, with what it traces and compiles
    time: Attribution = field(default_factory=Attribution)
    warm: bool = False  # whether the first call, which traces and compiles, is over


def load_agreed(cluster: Cluster, folder: CheckpointFolder, occasion: str) -> Checkpoint | None:
    """The newest whole checkpoint, as the chief sees it, so that all workers go on from the same step.

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


def note_start(task: Task, progress: Progress) -> None:
    """Begins an entry of the history: from which step on this process carries the run, and which keys changed there.

    It goes into each checkpoint, so it tells of the steps that a checkpoint stands for, and of no others.
    """
    earlier = task.config_yaml if progress.earlier_yaml is None else progress.earlier_yaml
    entry = {
        "from_step": progress.step,
        "changed": {key: list(values) for key, values in differing_keys(earlier, task.config_yaml).items()},
        "version": __version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "layout": dict(task.layout),
    }
    progress.history.append(entry)


def restore(task: Task, progress: Progress, saved: Checkpoint) -> None:
    """Puts the run back to where a checkpoint was saved, on every replica."""
    checkpoint.restore(task.weights, saved.weights)
    checkpoint.restore(task.optimizer_state, saved.optimizer)
    state = saved.state
    task.train_step.load_state(state)
    progress.step = progress.saved_step = progress.verified_step = saved.step
    progress.evaluated_step = -1 if state["validation_loss"] is None else saved.step
    progress.best_loss, progress.train_loss = state["best_validation_loss"], state["train_loss"]
    for entry in progress.history:  # of this process, after a rollback beyond the step it began with
        entry["from_step"] = min(entry["from_step"], progress.step)


def save(task: Task, saver: AsyncSaver, progress: Progress, background: bool) -> None:
    """Copies the state to host memory and has it written; only the chief has anything to do."""
    if progress.step == progress.saved_step or not task.cluster.is_chief:
        progress.saved_step = progress.step
        return
    weights, optimizer = checkpoint.snapshot(task.weights), checkpoint.snapshot(task.optimizer_state)
    evaluated = progress.evaluation if progress.evaluated_step == progress.step else None
    state = {
        "step": progress.step,
        "sequences_seen": sequences_seen(task, progress),
        "identity": dict(task.identity),
        "train_loss": progress.train_loss,
        "validation_loss": evaluated.loss if evaluated and math.isfinite(evaluated.loss) else None,
        "best_validation_loss": progress.best_loss,
        **task.train_step.to_state(),
        "ledger": progress.ledger.to_state(),
        "layout": dict(task.layout),
        "config": task.config_yaml,
        "history": [dict(entry) for entry in progress.history],
    }
    saver.save(Checkpoint(weights, optimizer, state), background)
    progress.saved_step = progress.step


def left_out(task: Task, progress: Progress) -> set[int]:
    """Positions that nothing is learned from: by the configuration, and since by spikes."""
    return {*task.left_out, *progress.ledger.left_out}


def sequences_seen(task: Task, progress: Progress) -> int:
    """Sequences of the global order that were trained on: those up to here, without those left out."""
    positions = progress.step * task.training.global_batch_size
    return positions - sum(position < positions for position in left_out(task, progress))

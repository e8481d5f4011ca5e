"""Where a run stands, and the checkpoint that all its workers go on from."""

import sys
from dataclasses import dataclass, field

from tfdp.checkpoint import Checkpoint, CheckpointFolder
from tfdp.cluster import Cluster, publish, read
from tfdp.evaluation import Evaluation
from tfdp.exits import ConfigError
from tfdp.metrics import Throughput
from tfdp.spikes import Ledger


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
    num_rollbacks: int = 0  # of this process
    since_log: Throughput = field(default_factory=Throughput)
    total: Throughput = field(default_factory=Throughput)
    first: Throughput = field(default_factory=Throughput)  # the first call, with what it traces and compiles
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
        except (ConfigError, OSError):
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

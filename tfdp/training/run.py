"""What the loop gets to run."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfdp.config.sections import CheckpointConfig, TrainingConfig
from tfdp.parallel.cluster import Cluster, FailureDetector
from tfdp.tasks.task import Task
from tfdp.training.averaging import Averaging
from tfdp.training.evaluation import Evaluation
from tfdp.training.run_directory import RunDirectory
from tfdp.training.stopping import StopSignal
from tfdp.training.synchronization import Steps
from tfdp.training.weights import WeightSets


@dataclass(frozen=True)
class Run:
    """One run: its parts as functions, and the process that runs it. The loop knows no more of what is trained."""

    directory: RunDirectory
    training: TrainingConfig
    checkpointing: CheckpointConfig
    identity: Mapping[str, Any]  # what a checkpoint must agree with to be resumed
    weights: WeightSets
    train_step: Steps
    batches_from: Callable[[int, Collection[int]], Iterator[Any]]  # the batches of a step and all after it
    excluded_positions: Collection[int]  # of the global order, by the configuration
    task: Task  # what is learned, and the metrics of it
    row_losses: Callable[[Iterator[Any], int], tuple[np.ndarray, np.ndarray]]  # see evaluation.RowLosses
    evaluate: Callable[[], Evaluation]
    sample: Callable[[], str] | None
    averaging: Averaging  # puts the average of the weights in their place for both of these
    cluster: Cluster
    watch: FailureDetector
    stop: StopSignal
    save_assets: Callable[
        [], None
    ]  # puts into the run directory what is needed to read the model back, besides checkpoints
    source_names: Sequence[str]  # of the text, in the order of the step's sums
    bytes_per_token: float  # of the training text
    tokens_per_sequence: float  # of training, in the mean, targets or not; what is absent does not count
    flops_per_token: int  # of those, whether they are targets or not
    matrix_peak: float  # FLOP/s of all devices together
    layout: Mapping[str, int]  # what it runs on: num_workers, num_replicas, microbatch_size, ...
    facts: Mapping[str, Any]  # added to summary.json
    config_yaml: str
    started: float = field(default_factory=time.monotonic)  # when the command began to work

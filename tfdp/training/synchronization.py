"""The steps of a run by its way to synchronise, `distribution.synchronization`: one file for each.

`step.py` (every_step) sums gradients over all replicas in each step. `local.py` (local) lets islands take steps of
their own and joins them at the end of a round. The loop asks both for the same: `Steps`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf

from tfdp.optim.average import WeightAverage
from tfdp.optim.optimizer import Optimizer
from tfdp.optim.outer import OuterOptimizer
from tfdp.optim.schedule import make_schedule
from tfdp.parallel import collectives
from tfdp.parallel.batch_layout import BatchLayout
from tfdp.parallel.consistency import Disagreement
from tfdp.parallel.distribution import Coordinator
from tfdp.parallel.synchronizer import AllReduce
from tfdp.tasks.task import LossFunction
from tfdp.training.changes import Changes, GatheredChanges, SummedChanges
from tfdp.training.compilation import Compilation
from tfdp.training.coordinated import CoordinatedSteps
from tfdp.training.island import Island
from tfdp.training.local import LocalSteps
from tfdp.training.step import UPDATE_GROUPS, StepRules, TrainStep
from tfdp.training.step_statistics import StepResults
from tfdp.training.update import Update


class Steps(Protocol):
    """What the loop asks of a way to synchronise.

    Attributes:
      phases: parts of the time of a call.
      reduction_bytes, num_reductions: of a step, in the mean over a round.
    """

    phases: tuple[str, ...]
    reduction_bytes: float
    num_reductions: float

    def __call__(self, batches: Iterator[Any], first_step: int, num_steps: int) -> StepResults:
        """Runs up to `num_steps` steps on the next batches; from one boundary to another."""
        ...

    def boundary(self, step: int) -> int:
        """The first step from `step` on after which a run can be evaluated, saved and stopped."""
        ...

    def collect(self) -> None:
        """Brings here what a checkpoint holds and other workers have; all workers call it together."""
        ...

    def metrics(self) -> dict[str, float | int]:
        """What else a line of a run says of it."""
        ...

    def to_state(self) -> dict[str, Any]:
        """What is known of earlier steps beside the variables, for a checkpoint."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes that back."""
        ...

    def verify(self, step: int) -> Disagreement | None:
        """Compares what all replicas hold before a step; all workers call it together."""
        ...

    def last_comparison(self, first_step: int, num_steps: int) -> int | None:
        """The last of some steps before which the replicas compared what they hold; None: before none of them."""
        ...

    def request_stop(self) -> None:
        """Ends the running call at its next boundary, on every worker; from any thread."""
        ...

    def request_end(self) -> None:
        """The same, but the run has reached its end; on the chief alone, once."""
        ...


def make_steps(
    config: Any,
    strategy: tf.distribute.Strategy,
    loss_function: LossFunction,
    optimizer: Optimizer,
    frozen: Sequence[keras.Variable],
    layout: BatchLayout,
    compilation: Compilation,
    num_sources: int,
    average: WeightAverage | None,
) -> tuple[Steps, dict[str, Any]]:
    """The steps, and the state that they update besides the weights, by name."""
    how, training = config.distribution, config.training
    schedule = make_schedule(config.optimizer, training.steps)
    if how.synchronization == "every_step":
        state = [*optimizer.state, *(average.variables if average else ()), *frozen]
        sums = AllReduce(strategy, optimizer.weights, state, how.reduction, how.wire_dtype, how.bytes_per_pack)
        made = (strategy, loss_function, optimizer, schedule, layout, _rules(config), compilation)
        return TrainStep(*made, num_sources, sums, average), optimizer.named_state()
    num_groups = 1 if collectives.on_gpu(strategy) else UPDATE_GROUPS
    update = Update(optimizer, schedule, config.optimizer.clip_norm, True, num_groups)
    rows = layout.global_batch_size // how.num_islands
    sums = AllReduce(strategy, optimizer.weights, [], "canonical", "float32", how.bytes_per_pack)
    changes: Changes = SummedChanges(sums)
    if how.delta_dtype != "float32":
        changes = GatheredChanges(strategy, optimizer.weights, how.num_islands, how.delta_dtype)
    island = Island(
        loss_function,
        optimizer,
        update,
        changes,
        layout.microbatch_size,
        rows // layout.microbatch_size,
        num_sources,
        training.spike_threshold,
        compilation,
    )
    with strategy.scope():
        outer = OuterOptimizer(how, optimizer.weights)
    arguments = (strategy, island, optimizer, outer, changes, frozen, how.num_islands, how.synchronize_every)
    more = {
        "num_steps": training.steps,
        "rows_of_island": rows,
        "num_sources": num_sources,
        "skips_refused": training.on_spike == "skip",
        "verifies": training.verify_every > 0,
        "parallel_islands": layout.parallel_microbatches,
    }
    if isinstance(strategy, Coordinator):
        steps: LocalSteps = CoordinatedSteps(strategy.pool, *arguments, **more)
    else:
        steps = LocalSteps(*arguments, **more)
    return steps, steps.named_state()


def _rules(config: Any) -> StepRules:
    return StepRules(
        clip_norm=config.optimizer.clip_norm,
        reduction=config.distribution.reduction,
        verify_every=config.training.verify_every,
        spike_threshold=config.training.spike_threshold,
        skip_spikes=config.training.on_spike == "skip",
        scales_loss=config.training.precision == "float16",
    )

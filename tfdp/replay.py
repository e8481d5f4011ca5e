"""Repeats one past step of a run, and shows the sequences with the highest loss: `python -m tfdp.replay --step 38`.

The run resumes from the nearest checkpoint before the step, or starts from its seed, in one process, with the
micro-batches, replicas and excluded positions that it had. So the loss and the gradient norm are those of metrics.jsonl
to
the bit: on CPUs, and on the same GPUs where distribution.reduction is canonical (the kernels of a fast one add in any
order). It uses the newest configuration of the run: if a key such as optimizer.learning_rate was changed on
the way, steps before the change are replayed with its new value. Nothing is written into the run.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tfdp.config.parsing import load
from tfdp.config.sections import MOST, MOST_DEVICES
from tfdp.recipe import FUNCTIONS, Recipe, recipe_of_file
from tfdp.system.exits import TrainingError, require, require_at_most, run_command
from tfdp.system.startup import load_tensorflow
from tfdp.tasks.flags import ID_MASK
from tfdp.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    from tfdp.data.sources import Corpus
    from tfdp.training.ledger import Spike
    from tfdp.training.run_directory import RunDirectory

_EXCERPT_WIDTH, _EXCERPT_LINES = 100, 4  # of the text of a sequence
_MOST_NAMES = 3  # of documents, for one sequence


@dataclass(frozen=True)
class LayoutConfig:
    """Where the step is replayed."""

    num_replicas: int | None = None
    """Replicas, in this one process; null: as many as the run had in total, on GPUs at most those of this machine."""

    def __post_init__(self) -> None:
        require_at_most(self, "distribution.", num_replicas=MOST_DEVICES)
        require(
            self.num_replicas is None or self.num_replicas >= 1,
            "distribution.num_replicas",
            self.num_replicas,
            "must be at least 1",
        )


@dataclass(frozen=True)
class Config:
    """The replay."""

    run_dir: str = "runs/latest"
    """Directory of the run."""
    step: int | None = None
    """Which update, as metrics.jsonl counts them, from 1; null: the last one that the run has reached."""
    num_sequences: int = 3
    """How many sequences of the step's batch to show, those with the highest mean loss first."""
    distribution: LayoutConfig = LayoutConfig()

    def __post_init__(self) -> None:
        require_at_most(self, step=MOST, num_sequences=MOST)
        require(self.step is None or self.step >= 1, "step", self.step, "must be at least 1, the first update: try 1")
        require(self.num_sequences >= 0, "num_sequences", self.num_sequences, "must not be negative: try 3")


# ---------------------------------------------------------------------------------------------------
# What the run directory tells
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PastRun:
    """A run as its directory tells it, without the tensors."""

    directory: "RunDirectory"
    recipe: Recipe
    config: Any
    logged: Mapping[int, Mapping[str, Any]]  # the rows of metrics.jsonl with a loss, by step
    reached: int  # the last step that left a trace
    excluded_positions: frozenset[int]  # by the configuration and after spikes
    states: Mapping[int, Mapping[str, Any]] = field(repr=False)  # state.json of each checkpoint, by step, ascending

    @classmethod
    def open(cls, run_dir: str) -> "PastRun":
        """Reads a run directory. Raises `ConfigError` where there is no run, or none that can be replayed."""
        from tfdp.inference.trained import refuse_other_keys
        from tfdp.reporting.rows import read_rows
        from tfdp.training.ledger import Ledger
        from tfdp.training.run_directory import RunDirectory

        run = RunDirectory.open(run_dir)
        recipe, config = recipe_of_file(run.config_path, FUNCTIONS, "replayed")
        how = config.distribution.synchronization
        rule = "must be a run with distribution.synchronization every_step: a step of islands is not replayed"
        require(how == "every_step", "run_dir", run_dir, rule)
        rows, damaged = read_rows(run.metrics_path)
        for line in damaged:
            print(f"warning: {line}", file=sys.stderr, flush=True)
        states = {step: run.checkpoints().state(step) for step in run.checkpoints().steps()}
        for state in list(states.values())[-1:]:
            refuse_other_keys(run, config, state)
        reached = max([0, *states, *(row["step"] for row in rows)])
        newest = list(states.values())[-1] if states else {}
        ledger = Ledger.from_state(newest.get("ledger", {}))
        since = {position for row in rows for position in row.get("spike_positions", [])}  # saved with the next one
        excluded_positions = frozenset({*config.data.excluded_positions, *ledger.excluded_positions, *since})
        return cls(
            run,
            recipe,
            config,
            {row["step"]: row for row in rows if "loss" in row},
            reached,
            excluded_positions,
            states,
        )

    def check_step(self, step: int) -> None:
        """Raises `ConfigError` for a step that the run has not reached.

        The run may have gone further than its files show, at most to the next step that it would have logged: up to
        a step that ended it, or to where the process died.
        """
        training = self.config.training
        last = min(training.steps, self.reached - self.reached % training.log_every + training.log_every)
        why = f"the run has {training.steps}" if last == training.steps else f"the run has reached {self.reached}"
        require(1 <= step <= last, "step", step, f"must lie in [1, {last}]: {why}")

    def open_corpus(self) -> "Corpus":
        """The text of the run. Raises `ConfigError` where it is another one now."""
        from tfdp.data import sources

        data = self.config.data
        data = sources.with_own_tokenizer(data, self.directory.tokenizer_path, data.tokenizer)
        if not self.states:  # nothing tells which it was
            return sources.open_corpus(data, sources.cache_dir(data))
        return sources.open_same_corpus(data, list(self.states.values())[-1]["identity"]["corpus_sha256"])

    def layout_of(self, step: int) -> Mapping[str, int] | None:
        """The layout that ran a step: that of the first checkpoint saved since, or else of the newest one."""
        since = [later for later in self.states if later >= step] or list(self.states)[-1:]
        return self.states[since[0]].get("layout") if since else None

    def check_replicas(self, step: int, num_replicas: int) -> int:
        """How many micro-batches of a step each replica has. Raises `ConfigError` where they cannot share them."""
        layout = self.layout_of(step) or {"microbatch_size": 1}  # a run without a checkpoint can be cut in any way
        num_microbatches = self.config.training.global_batch_size // layout["microbatch_size"]
        fitting = [count for count in range(1, num_microbatches + 1) if num_microbatches % count == 0]
        require(
            num_replicas in fitting,
            "distribution.num_replicas",
            num_replicas,
            f"must divide the number of micro-batches of a step of this run ({num_microbatches}): try "
            f"{', '.join(map(str, fitting))}",
        )
        return int(num_microbatches // num_replicas)

    def checkpoint_before(self, step: int) -> int | None:
        """The step of the newest checkpoint before the update `step`; None: there is none."""
        return max((saved for saved in self.states if saved < step), default=None)


# ---------------------------------------------------------------------------------------------------
# Running it again
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequence:
    """A sequence of the batch."""

    loss: float  # nats per token, mean, with the weights before the update
    position: int  # in the global order
    documents: list[str]  # names
    text: str


@dataclass(frozen=True)
class Replay:
    """The result of a step that was repeated."""

    step: int  # the one asked for, or an earlier one at which the replay ended
    loss: float
    grad_norm: float
    refused: "Spike | None"  # why the update was not applied, if it was not
    worst: list[Sequence]  # the highest loss first


class Replayer:
    """Brings a run to any of its steps; traced once.

    Args:
      run: which.
      corpus: the text of that run.
      step: the layout is that of the process that ran it.
      num_replicas: in this process; None: as in the layout.

    Raises:
      ConfigError: the replicas cannot share the micro-batches of the run.
    """

    def __init__(self, run: PastRun, corpus: "Corpus", step: int, num_replicas: int | None = None) -> None:
        from tfdp import assembly
        from tfdp.parallel import distribution

        self.run = run
        self.config = config_of_layout(run, step, num_replicas)
        self._tokenizer = corpus.tokenizer
        parallel = assembly.parallel_microbatches(run.recipe, self.config, corpus, num_workers=1)
        self.strategy = distribution.make_strategy(self.config.distribution, parallel_microbatches=parallel)
        self._components = assembly.build(run.recipe, self.config, corpus, self.strategy, parallel)
        self._weights = self._components.weights
        trainable, optimizer = self._weights.snapshot()
        self._initial = Checkpoint(trainable, optimizer, {"step": 0})

    def __call__(self, step: int, num_sequences: int = 3) -> Replay:
        """Runs up to a step, finds the sequences of its batch with the highest loss, and runs it.

        Raises:
          ConfigError: the run has not reached this step, or the checkpoint before it is damaged.
          TrainingError: the replicas of the replay disagree.
        """
        self.run.check_step(step)
        train_step, excluded_positions = self._components.train_step, self.run.excluded_positions
        saved = self.run.checkpoint_before(step)
        done = self._restore(self._initial if saved is None else self.run.directory.checkpoints().load(saved))
        if done < step - 1:
            results = train_step(self._components.batches_from(done, excluded_positions), done, step - 1 - done)
            _refuse_disagreement(results.disagreement)
            done += len(results.loss)  # fewer where a spike ended the call: that is the step to report
        worst = self._worst(done, num_sequences)
        results = train_step(self._components.batches_from(done, excluded_positions), done, 1)
        _refuse_disagreement(results.disagreement)
        if results.spike is not None:
            return Replay(done + 1, results.spike.loss, results.spike.grad_norm, results.spike, worst)
        skipped = results.skipped[0] if results.skipped else None
        return Replay(done + 1, float(results.loss[0]), float(results.grad_norm[0]), skipped, worst)

    def _restore(self, saved: "Checkpoint") -> int:
        self._weights.restore(saved.weights, saved.optimizer, saved.frozen, saved.average)
        self._components.train_step.load_state(saved.state)
        return saved.step

    def _worst(self, done: int, num_sequences: int) -> list[Sequence]:
        """The sequences of the next batch with the highest mean loss; those that are not finite come first."""
        batches = self._components.batches_from(done, self.run.excluded_positions)
        sums, counts = self._components.row_losses(batches, done)
        valid = np.flatnonzero(counts)  # an excluded position has no valid token
        means = sums[valid] / counts[valid]
        order = np.argsort(np.where(np.isfinite(means), -means, -math.inf), kind="stable")[:num_sequences]
        first = done * self.config.training.global_batch_size
        return [self._sequence(first + int(valid[row]), float(means[row])) for row in order]

    def _sequence(self, position: int, loss: float) -> Sequence:
        import tensorflow as tf

        from tfdp.data.shards import ABSENT

        order = self._components.order
        source, index = order.locate(tf.constant(position, tf.int64))
        sequences = order.sequences[int(source)]
        (tokens,) = sequences.rows(np.array([int(index)]))
        text = self._tokenizer.decode(tokens[tokens != ABSENT] & ID_MASK)  # of examples the ids carry flags
        return Sequence(loss, position, sequences.documents_of(int(index)), text)


def config_of_layout(run: PastRun, step: int, num_replicas: int | None) -> Any:
    """The configuration of the run, with its micro-batches and replicas in one process."""
    config = run.config
    layout = run.layout_of(step)
    if layout is not None:
        num_replicas = num_replicas or _that_fit(layout["num_replicas"])
        parallel = layout.get("parallel_microbatches", 1)
        share = run.check_replicas(step, num_replicas)
        config = replace(
            config,
            training=replace(
                config.training,
                microbatch_size=layout["microbatch_size"],
                parallel_microbatches=parallel if share % parallel == 0 else 1,
            ),
        )
    num_replicas = num_replicas or config.distribution.num_replicas
    strategy = config.distribution.strategy if num_replicas == 1 else "auto"
    strategy = "auto" if strategy == "multi_worker_mirrored" else strategy
    return replace(config, distribution=replace(config.distribution, strategy=strategy, num_replicas=num_replicas))


def _that_fit(num_replicas: int) -> int:
    """`num_replicas`, or with fewer GPUs the largest divisor of it that has a GPU for each."""
    from tfdp.parallel import distribution

    num_gpus = distribution.num_gpus() or num_replicas
    return max(count for count in range(1, num_gpus + 1) if num_replicas % count == 0)


def _refuse_disagreement(found: Any) -> None:
    if found is not None:
        raise TrainingError(f"the weights of the replicas differ in this replay, first in {found.tensor}")


# ---------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------


def report(found: Replay, asked: int, run: PastRun) -> str:
    """The result of a replay beside what the run logged, for people."""
    lines = []
    if found.step != asked:
        lines.append(f"the replay ends at step {found.step}, before step {asked}")
    if found.refused is not None:
        lines.append(f"{found.refused.describe()}: the update is not applied")
    row = run.logged.get(found.step)
    if row is None:
        lines.append(f"loss       {_shown(found.loss)}")
        lines.append(f"grad norm  {_shown(found.grad_norm)}")
        lines.append(f"step {found.step} was not logged: nothing to compare with")
    else:
        lines.append(f"{'':9}  {'replayed':<12}  {'logged':<12}  bits")
        for name, replayed, logged in (
            ("loss", found.loss, row["loss"]),
            ("grad norm", found.grad_norm, row["grad_norm"]),
        ):
            lines.append(f"{name:9}  {_shown(replayed):<12}  {_shown(logged):<12}  {compare(replayed, logged)}")
    if found.worst:
        lines.append("\nsequences of its batch with the highest loss per token, before the update:")
    for sequence in found.worst:
        names = ", ".join(sequence.documents[:_MOST_NAMES])
        more = len(sequence.documents) - _MOST_NAMES
        lines.append(
            f"\n{sequence.loss:.4f} nats per token, position {sequence.position}, from {names or 'no document'}"
            + (f" and {more} more" if more > 0 else "")
        )
        lines += [f"  | {part}" for part in _excerpt(sequence.text)]
    return "\n".join(lines)


def compare(replayed: float, logged: float | None) -> str:
    """Whether two values are the same float32, bit by bit; else their relative difference."""
    if logged is None:
        return "different" if math.isfinite(replayed) else "not finite in both"
    if np.float32(replayed).tobytes() == np.float32(logged).tobytes():
        return "equal"
    return f"different (relative difference {abs(replayed - logged) / max(abs(logged), sys.float_info.min):.1e})"


def _shown(value: float | None) -> str:
    """The shortest digits that name one float32."""
    return "null" if value is None else str(np.float32(value))


def _excerpt(text: str) -> list[str]:
    """A text in a few lines of one width, its line breaks written as \\n, shortened in the middle where it is long."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    lines = [shown[start : start + _EXCERPT_WIDTH] for start in range(0, len(shown), _EXCERPT_WIDTH)]
    if len(lines) <= _EXCERPT_LINES:
        return lines
    head = lines[: _EXCERPT_LINES - 1]
    return [*head, f"... {len(shown) - _EXCERPT_WIDTH * _EXCERPT_LINES} characters ...", shown[-_EXCERPT_WIDTH:]]


def main() -> None:
    description = "Repeat one past step of a run, compare it with the log, and show the sequences with the most loss."
    config = load(Config, sys.argv[1:], "python -m tfdp.replay", description)
    run = PastRun.open(config.run_dir)
    step = config.step or max(1, run.reached)
    run.check_step(step)
    if config.distribution.num_replicas is not None:
        run.check_replicas(step, config.distribution.num_replicas)
    corpus = run.open_corpus()
    load_tensorflow()
    from tfdp.parallel import distribution

    replayer = Replayer(run, corpus, step, config.distribution.num_replicas)
    saved = run.checkpoint_before(step)
    start = "the initial weights" if saved is None else f"the checkpoint of step {saved}"
    print(f"run        {run.directory.path}")
    print(f"step       {step} of {run.config.training.steps}, from {start}")
    print(f"devices    {distribution.describe(replayer.strategy)}", flush=True)
    print(f"\n{report(replayer(step, config.num_sequences), step, run)}")


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))

"""What a run will need, before it is trained: `python -m tfdp.plan [--config FILE.yaml] [--num_replicas R] ...`.

Parameters and bytes follow from the configuration. Times and the peak of the memory are measured: the same model with
one layer and with four trains a few steps on random tokens, in turns, and a line through both gives the wanted
depth. For a GPU that is not here they are estimated from its data sheet.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tfdp.benchmarking import estimates
from tfdp.benchmarking.estimates import Measured
from tfdp.benchmarking.running import Running
from tfdp.config.parsing import known_keys, load, to_yaml
from tfdp.config.run_config import with_run_config
from tfdp.config.sections import MOST, MOST_DEVICES, DataConfig
from tfdp.data import sources
from tfdp.interop.origin import with_origin_keys
from tfdp.models import dimensions
from tfdp.parallel import batch_layout
from tfdp.recipe import FUNCTIONS, SECTIONS, Recipe, import_recipe, load_recipe, require_functions
from tfdp.system.exits import require, require_at_most, run_command
from tfdp.system.machine import GPUS, available_gpus, find_gpu, total_memory
from tfdp.system.messages import duration

LAYERS = (1, 4)  # of the models that are measured; a model of no more layers than the last is measured itself
ASSUMED_MFU = 0.4  # of a GPU that is not here
LIBRARY_BYTES = 1 << 30  # of GPU memory that CUDA and its libraries take


@dataclass(frozen=True)
class Config:
    """The plan; takes --config and all keys of tfdp.train too."""

    num_replicas: int | None = None
    """Replicas of each worker; null: distribution.num_replicas."""
    num_workers: int = 1
    """Workers, each a machine like this one, or with GPUs of the kind that device names."""
    device: str | None = None
    """A kind of GPU, such as H100, to estimate for from its data sheet; null: this machine, measured."""
    network_gbits: float = 10.0
    """Gigabits per second that each worker can send to the next, for the reduction between workers."""
    rounds: int = 5
    """Turns of each measured model."""
    output: str | None = None
    """A JSON file for the plan."""

    def __post_init__(self) -> None:
        require_at_most(self, num_replicas=MOST_DEVICES, num_workers=65_536, rounds=MOST, network_gbits=1e6)
        for name in ("num_workers", "rounds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(
            self.num_replicas is None or self.num_replicas >= 1, "num_replicas", self.num_replicas, "must be positive"
        )
        require(self.network_gbits > 0, "network_gbits", self.network_gbits, "must be positive: try 10")
        known = self.device is None or find_gpu(self.device) is not None
        require(known, "device", self.device, f"must be one of {', '.join(GPUS)}, or null for this machine")
        folder = Path(self.output or ".").parent
        require(folder.is_dir(), "output", self.output, f"must lie in a folder that exists: make {folder}")


@dataclass(frozen=True)
class Plan:
    """What a run will need; bytes of memory are those of one replica on a GPU, and of one worker on CPUs."""

    num_params: int
    num_replicas: int  # over all workers
    num_workers: int
    weight_bytes: int
    optimizer_bytes: int
    average_bytes: int  # of training.ema_decay
    island_bytes: int  # of what islands keep besides
    gradient_bytes: int
    activation_bytes: int
    peak_memory_bytes: int
    memory_bytes: int | None  # that there is; None where it is that of a GPU here
    reduction_bytes: int  # of a step, in the mean over a round of islands
    network_seconds: float  # of that between workers, at best
    checkpoint_bytes: int
    step_seconds: float
    tokens_per_second: float
    first_step_seconds: float | None
    total_seconds: float  # of all steps, without evaluations


def make_plan(config: Config, run: Any, recipe: Recipe) -> Plan:
    """Plans the run of a recipe's configuration.

    Raises:
      ConfigError: the global batch does not divide among the workers and replicas.
      TrainingError: a measured model failed.
    """
    vocab_size = sources.expected_vocab_size(run.data)
    trained = dimensions.trained(shapes := recipe.weight_shapes(run, vocab_size))
    require(bool(shapes), "trainer", run.trainer, "must know the shapes of its weights to be planned: try causal_lm")
    num_here = len(available_gpus())
    num_local = run.distribution.num_replicas or num_here or 1
    num_replicas = num_local * config.num_workers
    batch = run.training.global_batch_size
    rule = f"must be a multiple of the {num_replicas} replicas: try {-(-batch // num_replicas) * num_replicas}"
    require(batch % num_replicas == 0, "training.global_batch_size", batch, rule)
    num_params, num_trained = dimensions.num_params(shapes), dimensions.num_params(trained)
    num_state = estimates.num_state_numbers(run.optimizer, trained)
    num_averages = 0 if run.training.ema_decay is None else num_trained
    num_gpus = num_local if config.device else num_here
    how, training = run.distribution, batch_layout.of_islands(run.training, run.distribution)
    parallel = batch_layout.parallel_microbatches(
        how, training, config.num_workers, num_trained, run.model.context_length, num_gpus
    )
    size = batch_layout.cut(num_replicas, run.training, how, parallel).microbatch_size
    activations = parallel * estimates.activation_bytes(run.model, run.training, vocab_size, size)
    num_islands = estimates.num_island_numbers(how, num_trained, num_state, num_replicas)
    num_stored = estimates.num_stored_island_numbers(how, num_trained, num_state)
    steps = 1 if how.synchronization == "every_step" else how.synchronize_every
    reduced = estimates.reduction_bytes(how, trained, num_replicas)
    network = estimates.network_seconds(how, reduced, config.num_workers, config.network_gbits) / steps
    if config.device is None:
        found = _measure(run, vocab_size, config)
        memory, first_step = None if num_here else total_memory(), found.first_step_seconds
        step_seconds, peak = found.step_seconds + network, found.peak_memory_bytes
    else:
        gpu = find_gpu(config.device)
        assert gpu is not None
        flops = estimates.flops_per_token(run.model, vocab_size) * batch * run.model.context_length
        reachable = ASSUMED_MFU * gpu.matrix_peak(run.training.precision) * num_replicas
        step_seconds, first_step, memory = flops / reachable + network, None, round(gpu.memory_bytes)
        num_gradients = parallel + (parallel * size * num_replicas < batch)  # and their sum, where there are more
        numbers = num_params + num_trained * num_gradients + num_state + num_averages + num_islands
        peak = 4 * numbers + activations + LIBRARY_BYTES
    return Plan(
        num_params=num_params,
        num_replicas=num_replicas,
        num_workers=config.num_workers,
        weight_bytes=4 * num_params,
        optimizer_bytes=4 * num_state,
        average_bytes=4 * num_averages,
        gradient_bytes=4 * num_trained,
        activation_bytes=activations,
        peak_memory_bytes=peak,
        memory_bytes=memory,
        island_bytes=4 * num_islands,
        reduction_bytes=round(reduced / steps),
        network_seconds=network,
        checkpoint_bytes=4 * (num_trained + num_state + num_averages + num_stored),
        step_seconds=step_seconds,
        tokens_per_second=batch * run.model.context_length / step_seconds,
        first_step_seconds=first_step,
        total_seconds=run.training.steps * step_seconds,
    )


def _measure(run: Any, vocab_size: int, config: Config) -> Measured:
    """One worker's share of a step, without the reduction between workers."""
    depth = run.model.num_layers
    depths = sorted({min(depth, num_layers) for num_layers in LAYERS}) if depth > LAYERS[-1] else [depth]
    with tempfile.TemporaryDirectory() as folder:
        running = []
        try:
            for num_layers in depths:
                path = Path(folder, f"{num_layers}.yaml")
                path.write_text(to_yaml(_with_layers(run, num_layers, config.num_workers)), encoding="utf-8")
                running.append(
                    Running(
                        f"a model of {num_layers} layers", ["tfdp.benchmarking.planned", str(path), str(vocab_size)]
                    )
                )
                running[-1].settle(1.0)
            for _ in range(config.rounds):
                for each in running:
                    each.round()
            found = [
                Measured(num_layers, each.median_seconds, each.end(), each.first_step_seconds)
                for num_layers, each in zip(depths, running, strict=True)
            ]
        except BaseException:
            for each in running:
                each.kill()
            raise
    return found[0].extended(found[-1], depth)


def _on_text(run: Any) -> Any:
    """The run on plain text, where its recipe learns from examples: random tokens are none, and a row costs the same
    (but for a prompt that sees itself whole, whose attention computes the masked half as well)."""
    if not getattr(run, "learns_examples", False):
        return run
    own = {name: getattr(run, name) for name in SECTIONS}
    own |= {"model": replace(run.model, prompt_attention="causal"), "data": DataConfig(document_attention=True)}
    return import_recipe("causal_lm").Config(seed=run.seed, **own)


def _with_layers(run: Any, num_layers: int, num_workers: int) -> Any:
    """The run of one worker by itself, with so many layers, on text that need not be there."""
    run = _on_text(run)
    share = run.training.global_batch_size // num_workers
    training = replace(run.training, global_batch_size=share, spike_threshold=None)  # random tokens may leap
    strategy = "one_device" if run.distribution.strategy == "one_device" else "auto"
    has_islands = run.distribution.synchronization != "every_step"
    islands = {"num_islands": max(1, run.distribution.num_islands // num_workers)} if has_islands else {}
    own = {"init_from": None} if hasattr(run.model, "init_from") else {}  # whose weights have another depth
    return replace(
        run,
        model=replace(run.model, num_layers=num_layers, **own),
        data=DataConfig(document_attention=run.data.document_attention),
        training=training,
        distribution=replace(run.distribution, strategy=strategy, **islands),
    )


def report(plan: Plan, config: Config, num_steps: int) -> str:
    """The plan for people."""
    peak = f"{_megabytes(plan.peak_memory_bytes)} of each {'worker' if config.device is None else 'GPU'}"
    if plan.memory_bytes is not None:
        fits = plan.peak_memory_bytes <= plan.memory_bytes
        peak += f", which has {_megabytes(plan.memory_bytes)}{'' if fits else ': TOO LITTLE'}"
    lines = [
        f"model        {plan.num_params:,} parameters",
        f"replicas     {plan.num_replicas} on {plan.num_workers} worker{'s' * (plan.num_workers > 1)}",
        f"weights      {_megabytes(plan.weight_bytes)}, their gradients as much, optimizer state "
        f"{_megabytes(plan.optimizer_bytes)}"
        + (f", their average {_megabytes(plan.average_bytes)}" if plan.average_bytes else "")
        + (f", for the islands {_megabytes(plan.island_bytes)}" if plan.island_bytes else ""),
        f"activations  {_megabytes(plan.activation_bytes)} of the micro-batches that are computed in parallel",
        f"peak memory  {peak}",
        f"reduction    {_megabytes(plan.reduction_bytes)} a step"
        + (f", {plan.network_seconds:.3f} s between workers" if plan.num_workers > 1 else ""),
        f"checkpoint   {_megabytes(plan.checkpoint_bytes)}",
        f"step         {plan.step_seconds:.3f} s, {plan.tokens_per_second:,.0f} tokens/s, "
        + (
            "measured here"
            if config.device is None
            else f"if {ASSUMED_MFU:.0%} of the {config.device}'s peak is reached"
        ),
        f"whole run    {num_steps:,} steps in {duration(plan.total_seconds)}"
        + ("" if plan.first_step_seconds is None else f", the first after {plan.first_step_seconds:.0f} s")
        + "; evaluations not counted",
    ]
    return "\n".join(lines)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e10 else f"{count / 1e9:,.1f} GB"


def _own_and_rest(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits arguments into the keys of the plan and those of the run."""
    own: list[str] = []
    rest: list[str] = []
    named = {f"--{key}" for key in known_keys(Config)} | {"--help", "-h"}
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        target = own if argument.partition("=")[0] in named else rest
        target.append(argument)
        if argument in named and argument not in ("--help", "-h") and arguments:
            target.append(arguments.pop(0))
    return own, rest


def main() -> None:
    own, rest = _own_and_rest(sys.argv[1:])
    description = (
        "Say what a run will need before it is trained: memory, bytes, seconds. Takes --config and all keys of "
        "tfdp.train besides these; about a minute on two CPU cores."
    )
    config = load(Config, own, "python -m tfdp.plan", description)
    rest = with_run_config(rest)
    recipe, run = load_recipe(rest, "python -m tfdp.plan", description, with_origin_keys)
    require_functions(recipe, run.trainer, FUNCTIONS, "planned")
    if config.num_replicas is not None:
        run = replace(run, distribution=replace(run.distribution, num_replicas=config.num_replicas))
    plan = make_plan(config, run, recipe)
    print(report(plan, config, run.training.steps))
    if config.output is not None:
        Path(config.output).write_text(json.dumps(asdict(plan), indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))

"""Puts a recipe, a configuration and a text together: the components of a run, for all commands that need them."""

import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfdp.config.parsing import flatten, to_yaml
from tfdp.config.run_config import recorded_values
from tfdp.recipe import FUNCTIONS, Model, Recipe, require_functions
from tfdp.system.code import code_sha256, place_of
from tfdp.system.exits import require

if TYPE_CHECKING:  # this module opens the text before TensorFlow is loaded
    from tfdp.data.pipeline import Order
    from tfdp.data.sources import Corpus
    from tfdp.optim.optimizer import Optimizer
    from tfdp.parallel.batch_layout import BatchLayout
    from tfdp.parallel.cluster import Cluster, FailureDetector
    from tfdp.parallel.cluster_spec import Jobs
    from tfdp.tasks.task import Task
    from tfdp.training.averaging import Averaging
    from tfdp.training.compilation import Compilation
    from tfdp.training.evaluation import Evaluator, RowLosses
    from tfdp.training.run_directory import RunDirectory
    from tfdp.training.stopping import StopSignal
    from tfdp.training.synchronization import Steps
    from tfdp.training.weights import WeightSets


@dataclass(frozen=True)
class Process:
    """The process that runs, and the workers that it belongs to."""

    directory: "RunDirectory"
    cluster: "Cluster"
    watch: "FailureDetector"
    stop: "StopSignal"
    started: float


@dataclass(frozen=True)
class Components:
    """The components of a run, made under one strategy."""

    model: Model
    task: "Task"
    optimizer: "Optimizer"
    weights: "WeightSets"
    averaging: "Averaging"
    train_step: "Steps"
    row_losses: "RowLosses"
    evaluator: "Evaluator"
    order: "Order"
    batches_from: Callable[[int, Collection[int]], Iterator[Any]]  # (step, excluded positions) -> from there on
    layout: "BatchLayout"
    compilation: "Compilation"


def train(recipe: Recipe, config: Any) -> dict[str, Any]:
    """Trains, or resumes; returns what summary.json holds.

    The cluster, the run directory and the text are checked before TensorFlow is loaded: a mistake there is reported in
    a fraction of a second. `config` is the recipe's `Config`.
    """
    started = time.monotonic()
    require_functions(recipe, config.trainer, FUNCTIONS, "trained")
    from tfdp.parallel.cluster_spec import find_cluster, find_jobs
    from tfdp.training.run_directory import RunDirectory
    from tfdp.training.stopping import StopSignal

    jobs = find_jobs(config.distribution)
    if jobs is not None and jobs.kind != "chief":
        return _serve(jobs)
    with StopSignal() as stop:
        cluster = find_cluster(config.distribution)
        require(
            config.run_dir is not None or cluster.num_workers == 1,
            "run_dir",
            config.run_dir,
            "must be named where there are several workers: try --run_dir runs/NAME",
        )
        with RunDirectory.holding(config.run_dir, cluster.is_chief) as directory:
            return _train(recipe, config, directory, cluster, jobs, stop, started)


def _serve(jobs: "Jobs") -> dict[str, Any]:
    """A worker or a parameter server: it computes or holds what the chief says, and needs neither text nor model."""
    from tfdp.system.startup import load_tensorflow

    load_tensorflow()
    from tfdp.parallel.cluster import probe
    from tfdp.parallel.pool import serve

    [chief] = jobs.addresses["chief"]
    serve(jobs, lambda: probe(chief, timeout_seconds=2.0) == "alive")
    return {}


def _train(
    recipe: Recipe,
    config: Any,
    directory: "RunDirectory",
    cluster: "Cluster",
    jobs: "Jobs | None",
    stop: "StopSignal",
    started: float,
) -> dict[str, Any]:
    """Opens the text, makes the strategy and checks that all workers agree."""
    from tfdp.data import sources
    from tfdp.interop.origin import without_origin
    from tfdp.parallel.cluster import FailureDetector, require_agreement
    from tfdp.system.startup import load_tensorflow

    recorded = recorded_values(directory.path).get("data.tokenizer")
    data = sources.with_own_tokenizer(config.data, directory.tokenizer_path, recorded)
    corpus = sources.open_corpus(data, sources.cache_dir(data))
    corpus.check_lengths(config.model.context_length)
    rows, num_tokens = getattr(config.model, "vocab_size", None), corpus.tokenizer.vocab_size
    rule = f"must be at least the number of tokens of the tokenizer: try {num_tokens}"
    require(rows is None or rows >= num_tokens, "model.vocab_size", rows, rule)

    load_tensorflow()
    from tfdp.parallel import distribution

    layout = config.distribution
    with FailureDetector(cluster, layout.peer_timeout_seconds, layout.start_timeout_seconds).watching() as watch:
        built = without_origin(config) if directory.checkpoints().steps() else config
        parallel = parallel_microbatches(recipe, built, corpus, cluster.num_workers)
        strategy = distribution.make_strategy(layout, cluster, parallel, watch.wait_for_start, jobs)
        if cluster.num_workers > 1:  # the facts include digests of large files
            require_agreement(cluster, shared_facts(recipe, built, corpus, strategy), watch.wait_for_start)
        distribution.connect_workers(strategy, layout, cluster)
        process = Process(directory, cluster, watch, stop, started)
        return _fit(config, corpus, strategy, build(recipe, built, corpus, strategy, parallel), process)


def _fit(config: Any, corpus: "Corpus", strategy: Any, components: Components, process: Process) -> dict[str, Any]:
    """Prints what the run consists of, and runs the loop."""
    from tfdp.inference.samples import Samples
    from tfdp.parallel import collectives, distribution
    from tfdp.reporting import hardware
    from tfdp.system import console
    from tfdp.training import loop
    from tfdp.training.identity import identity
    from tfdp.training.introduction import introduction
    from tfdp.training.run import Run

    training, directory, cluster = config.training, process.directory, process.cluster
    sampling = Samples(components.model, corpus.tokenizer, training.sample_tokens) if training.sample_tokens else None
    matrix_peak = hardware.matrix_peak(
        training.precision,
        distribution.gpu_names(strategy),
        cluster.num_workers,
        collectives.num_local_replicas(strategy) * components.layout.parallel_microbatches,
    )
    say = console.say if cluster.is_chief else (lambda _line: None)
    for line in introduction(config, corpus, strategy, components, matrix_peak):
        say(line)
    say(f"run        {directory.path}")
    summary = loop.fit(
        Run(
            directory=directory,
            training=training,
            checkpointing=config.checkpoint,
            identity=identity(config, corpus),
            weights=components.weights,
            train_step=components.train_step,
            batches_from=components.batches_from,
            excluded_positions=config.data.excluded_positions,
            task=components.task,
            row_losses=components.row_losses,
            evaluate=components.evaluator,
            sample=sampling,
            averaging=components.averaging,
            cluster=cluster,
            watch=process.watch,
            stop=process.stop,
            save_assets=lambda: _save_assets(config, corpus, directory),
            source_names=[source.name for source in corpus.sources],
            bytes_per_token=corpus.bytes_per_token,
            tokens_per_sequence=components.order.tokens_per_sequence,
            flops_per_token=components.model.flops_per_token(),
            matrix_peak=matrix_peak,
            layout=_layout(cluster, strategy, components.layout),
            facts=_facts(corpus, strategy, components),
            config_yaml=to_yaml(config, without=["run_dir"]),
            started=process.started,
        )
    )
    if sampling is not None and sampling.newest is not None:
        say(f"\n--- a sample ---\n{sampling.newest}\n---\n")
    say(directory.next_steps(*([config.next_step] if hasattr(config, "next_step") else [])))
    return summary


def _facts(corpus: "Corpus", strategy: Any, components: Components) -> dict[str, Any]:
    """What stands in summary.json beside what was measured."""
    from tfdp.parallel import collectives
    from tfdp.tasks.task import facts_of

    return {
        **facts_of(components.task),
        "num_params": components.model.num_params(),
        "corpus_sha256": corpus.corpus_sha256,
        "transport": collectives.transport_of(strategy),
    }


def _save_assets(config: Any, corpus: "Corpus", directory: "RunDirectory") -> None:
    """What the use of a run needs of its text, which may be gone then."""
    from tfdp.data import examples, sources
    from tfdp.data.tokenizers.tokenizer import save_tokenizer

    save_tokenizer(corpus.tokenizer, directory.tokenizer_path)
    is_told = examples.ExampleKeys.of(config.data).makes_examples  # by the configuration
    if not is_told and (ways := sources.example_keys(config.data)):
        examples.save_keys(directory.examples_path, ways)


def _layout(cluster: "Cluster", strategy: Any, layout: "BatchLayout") -> dict[str, int]:
    """What a run runs on, as its checkpoints record it."""
    return {
        "num_workers": cluster.num_workers,
        "num_replicas": int(strategy.num_replicas_in_sync),
        "microbatch_size": layout.microbatch_size,
        "parallel_microbatches": layout.parallel_microbatches,
    }


def parallel_microbatches(recipe: Recipe, config: Any, corpus: "Corpus", num_workers: int) -> int:
    """Micro-batches that each replica computes at the same time."""
    from tfdp.models.dimensions import gradient_size
    from tfdp.parallel import batch_layout, distribution

    return batch_layout.parallel_microbatches(
        config.distribution,
        batch_layout.of_islands(config.training, config.distribution),
        num_workers,
        gradient_size(recipe.weight_shapes(config, corpus.tokenizer.vocab_size)),
        config.model.context_length,
        distribution.num_gpus(),
    )


def build(recipe: Recipe, config: Any, corpus: "Corpus", strategy: Any, parallel_microbatches: int) -> Components:
    """Makes the model with its initial weights, its step, its evaluation and its batches; runs nothing.

    Args:
      parallel_microbatches: for which the strategy was made.

    Raises:
      ConfigError: the global batch cannot be cut among the replicas of this strategy.
    """
    from tfdp.optim.average import WeightAverage
    from tfdp.optim.optimizer import Optimizer
    from tfdp.parallel import batch_layout
    from tfdp.tasks.task import row_losses, source_losses
    from tfdp.training.averaging import Averaging
    from tfdp.training.evaluation import RowLosses
    from tfdp.training.synchronization import make_steps
    from tfdp.training.weights import WeightSets

    training = config.training
    vocab_size, num_sources = corpus.tokenizer.vocab_size, len(corpus.sources)
    num_replicas = int(strategy.num_replicas_in_sync)
    layout = batch_layout.cut(num_replicas, training, config.distribution, parallel_microbatches)
    compilation = _compilation(recipe, config, vocab_size, strategy)
    task = _checked(recipe.make_task(config, corpus), config.trainer)
    with strategy.scope():
        model = recipe.make_model(config, vocab_size, compilation.kernels)
        optimizer, decay = Optimizer(config.optimizer, model.trainable_variables), training.ema_decay
        average = None if decay is None else WeightAverage(decay, optimizer.weights)
    named = model.named_weights()
    averages = {} if average is None else average.named(named)
    losses = row_losses(task, model, config.seed, training.loss_chunk_size, compilation.kernels)
    loss_function, frozen = source_losses(losses, num_sources), model.named_frozen_weights()
    train_step, state = make_steps(
        config, strategy, loss_function, optimizer, list(frozen.values()), layout, compilation, num_sources, average
    )
    weights = WeightSets(named, frozen, state, averages)
    rows = training.rows_of_evaluation
    evaluator = make_evaluator(recipe, config, corpus, strategy, model, compilation, rows, parallel_microbatches)
    order, batches_from = _batches(recipe, config, corpus, strategy)
    return Components(
        model,
        task,
        optimizer,
        weights,
        Averaging(strategy, [named[name] for name in averages], list(averages.values())),
        train_step,
        RowLosses(strategy, losses, layout.microbatch_size, compilation.whole),
        evaluator,
        order,
        batches_from,
        layout,
        compilation,
    )


def _checked(task: "Task", trainer: str) -> "Task":
    """The task. Raises `ConfigError` where the metric that it compares checkpoints by is none of its own."""
    import numpy as np

    from tfdp.tasks.task import num_statistics

    totals = {"loss": 1.0, "targets": 1, "bytes": 1, "statistics": np.ones(num_statistics(task)), "outputs": []}
    names = list(task.metrics(totals))
    rule = f"must have a task whose best ({task.best}) is one of its metrics: {', '.join(names) or 'there are none'}"
    require(task.best in names, "trainer", trainer, rule)
    return task


def _compilation(recipe: Recipe, config: Any, vocab_size: int, strategy: Any) -> "Compilation":
    from tfdp.models.dimensions import largest_matrix
    from tfdp.parallel import collectives
    from tfdp.training.compilation import Compilation

    largest, on_gpu = largest_matrix(recipe.weight_shapes(config, vocab_size)), collectives.on_gpu(strategy)
    return Compilation.choose(config.training.jit_compile, config.training.precision, on_gpu, largest)


def _batches(
    recipe: Recipe, config: Any, corpus: "Corpus", strategy: Any
) -> tuple["Order", Callable[[int, Collection[int]], Iterator[Any]]]:
    """The order of the rows, and the batches from a step on, without the excluded positions."""
    from tfdp.data import pipeline

    order = pipeline.Order(
        [recipe.make_sequences(config, split) for split in corpus.train],
        [source.weight for source in corpus.sources],
        config.data.partition,
        config.seed,
        config.training.global_batch_size,
    )
    return order, lambda step, excluded: iter(pipeline.train_batches(strategy, order, step, excluded))


def make_evaluator(
    recipe: Recipe,
    config: Any,
    corpus: "Corpus",
    strategy: Any,
    model: Model,
    compilation: "Compilation",
    rows: int,
    parallel_passes: int = 1,
) -> "Evaluator":
    """Evaluates a model on the validation text of all sources, `rows` sequences in a forward pass of each replica."""
    from tfdp.tasks.task import evaluation_sums
    from tfdp.training.evaluation import Evaluator, ValidationSet

    splits = {source.name: source.shards.validation for source in corpus.sources}
    sets = [
        ValidationSet(name, recipe.make_sequences(config, split), split.num_bytes) for name, split in splits.items()
    ]
    task = recipe.make_task(config, corpus)
    sums = evaluation_sums(task, model, len(sets), config.training.loss_chunk_size, compilation.kernels)
    outputs: dict[str, Any] = {}
    if (decoding := getattr(task, "decoding", None)) is not None:
        from tfdp.inference.hypotheses import Hypotheses

        hypotheses = Hypotheses(strategy, model, corpus.tokenizer, decoding, parallel_passes, config.data.too_long)
        outputs = {name: hypotheses.writer(split) for name, split in splits.items()}
    return Evaluator(strategy, task, sums, sets, rows, compilation.whole, parallel_passes, outputs)


def shared_facts(recipe: Recipe, config: Any, corpus: "Corpus", strategy: Any) -> dict[str, Any]:
    """What all workers must have in common: text, code, devices, and every key but the place of the cache."""
    from tfdp.interop.origin import digest_of
    from tfdp.parallel import distribution

    keys = flatten(config)
    del keys["data.cache_dir"]
    folder = keys.get("model.init_from")
    return {
        **keys,
        **({} if folder is None else {"weights of model.init_from": digest_of(folder)}),
        "split_sha256": corpus.split_sha256,
        "code_sha256": code_sha256(*_code_of(recipe, config)),
        **distribution.shared_facts(strategy),
    }


def _code_of(recipe: Recipe, config: Any) -> list[Path]:
    """Where the code of a recipe lies: its own folder, that of recipes it may import from, and that of its model."""
    files = (getattr(module, "__file__", None) for module in (recipe, sys.modules.get("trainers")))
    model = place_of(getattr(config.model, "builder", "").partition(":")[0])
    return sorted({*(Path(file).parent for file in files if file), *([model] if model else [])})

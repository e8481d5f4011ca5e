"""Causal language modelling: next-token prediction on packed text. `python -m tfdp.train` runs this recipe.

TensorFlow is loaded inside `train`, once the configuration, the cluster, the run directory and the text are known to
be right: `--help`, a wrong key and a wrong source answer in a fraction of a second.
"""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfdp.config import (
    MOST_TOKENS,
    CheckpointConfig,
    DataConfig,
    DistributionConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainingConfig,
    code_sha256,
    flatten,
    import_trainer,
    require,
    to_yaml,
)

if TYPE_CHECKING:
    from tfdp.cluster import Cluster
    from tfdp.compilation import Compilation
    from tfdp.data import Order
    from tfdp.evaluation import Evaluator, RowLosses
    from tfdp.gpt import GPT
    from tfdp.optimizer import Optimizer
    from tfdp.runs import RunDirectory
    from tfdp.sources import Corpus
    from tfdp.step import TrainStep
    from tfdp.stopping import StopSignal
    from tfdp.tasks.causal_lm import CausalLM
    from tfdp.weights import WeightSets


@dataclass(frozen=True)
class Config:
    """The run."""

    run_dir: str | None = None
    """Where everything of this run is written; an existing one is resumed; null: a new runs/DATE-TIME."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and dropout."""
    trainer: str = "causal_lm"
    """The recipe: a module of trainers/, or the dotted path of your own."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    distribution: DistributionConfig = DistributionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        # The order of the data looks at the low 30 bits of a seed only.
        require(0 <= self.seed < 2**30, "seed", self.seed, "must lie in [0, 2**30): try 0")
        require(self.run_dir != "", "run_dir", self.run_dir, "must name a folder: try --run_dir runs/NAME")
        largest = MOST_TOKENS // self.model.context_length
        require(
            self.training.global_batch_size <= largest,
            "training.global_batch_size",
            self.training.global_batch_size,
            f"must be at most 2**24 tokens, {largest} sequences of model.context_length: try {largest}",
        )
        require(
            self.distribution.reduction == "fast" or self.training.microbatch_size is not None,
            "distribution.reduction",
            self.distribution.reduction,
            f"needs training.microbatch_size, the unit that is the same under every layout: try "
            f"{max(1, self.training.global_batch_size // 4)}",
        )


def train(config: Config) -> dict[str, Any]:
    """Trains a GPT; returns what summary.json holds."""
    started = time.monotonic()
    from tfdp.cluster_spec import find_cluster
    from tfdp.runs import RunDirectory
    from tfdp.stopping import StopSignal

    with StopSignal() as stop:
        cluster = find_cluster(config.distribution)
        require(
            config.run_dir is not None or cluster.num_workers == 1,
            "run_dir",
            config.run_dir,
            "must be named where there are several workers: try --run_dir runs/NAME",
        )
        with RunDirectory.holding(config.run_dir, cluster.is_chief) as run:
            return _train(config, run, cluster, stop, started)


def _train(
    config: Config, run: "RunDirectory", cluster: "Cluster", stop: "StopSignal", started: float
) -> dict[str, Any]:
    """Opens the text, starts the replicas and comes to terms with the other workers."""
    from tfdp import sources
    from tfdp.cluster import Watch, require_agreement
    from tfdp.startup import load_tensorflow

    corpus = sources.open_corpus(config.data, sources.cache_dir(config.data))
    corpus.check_lengths(config.model.context_length)

    load_tensorflow()
    from tfdp import distribution

    layout = config.distribution
    with Watch(cluster, layout.peer_timeout_seconds, layout.start_timeout_seconds).watching() as watch:
        side_by_side = _of_recipe(config, num_side_by_side)(config, corpus, cluster.num_workers)
        strategy = distribution.make_strategy(layout, cluster, side_by_side, watch.wait_for_start)
        require_agreement(cluster, shared_facts(config, corpus, strategy), watch.wait_for_start)
        distribution.connect_workers(strategy, layout, cluster)
        return _fit(config, run, corpus, strategy, cluster=cluster, watch=watch, stop=stop, started=started)


def _fit(config: Config, run: "RunDirectory", corpus: "Corpus", strategy: Any, **process: Any) -> dict[str, Any]:
    """Builds the parts of the run, tells what they are, and runs the loop.

    Args:
      process: the fields of `run.Run` that say where this runs: cluster, watch, stop, started.
    """
    from tfdp import console, distribution, loop, metrics
    from tfdp.run import Run
    from tfdp.sampling import Sampler
    from tfdp.tokenizer import save_tokenizer

    training, context_length = config.training, config.model.context_length
    parts = _of_recipe(config, build)(config, corpus, strategy)
    model = parts.model
    sampler = Sampler(model, corpus.tokenizer)
    sampling = SamplingConfig(num_tokens=max(1, training.sample_tokens))
    samples: list[str] = []  # the newest, which is shown at the end: drawing it again would hold the end up

    def sample() -> str:
        samples[:] = [sampler.text("", sampling)]
        return samples[0]

    matrix_peak = metrics.matrix_peak(
        training.precision,
        distribution.gpu_names(strategy),
        process["cluster"].num_workers,
        distribution.num_local_replicas(strategy) * parts.num_side_by_side,
    )

    say = console.say if process["cluster"].is_chief else (lambda _line: None)
    say(f"model      {model.describe()}")
    for line in corpus.describe():
        say(f"data       {line}")
    say(f"order      {parts.order.describe(training.steps, [source.name for source in corpus.sources])}")
    say(f"devices    {distribution.describe(strategy)}, matrix peak {matrix_peak / 1e9:,.0f} GFLOP/s")
    say(f"precision  {training.precision}, {parts.compilation}")
    cut = distribution.describe_batch(strategy, training, parts.microbatch_size, parts.num_side_by_side)
    say(f"step       {cut} of {context_length} tokens")
    if parts.train_step.num_reductions:
        count = parts.train_step.num_reductions
        say(f"reduction  {parts.train_step.reduction_bytes / 1e6:,.1f} MB in {count} pack{'s' * (count > 1)}")
    say(f"run        {run.path}")
    summary = loop.fit(
        Run(
            directory=run,
            training=training,
            checkpointing=config.checkpoint,
            identity=identity(config, corpus),
            weights=parts.weights,
            train_step=parts.train_step,
            batches_from=parts.batches_from,
            left_out=config.data.left_out,
            task=task_of(config, corpus),
            row_losses=parts.row_losses,
            evaluate=parts.evaluator,
            sample=sample if training.sample_tokens else None,
            flops_per_token=model.flops_per_token(),
            matrix_peak=matrix_peak,
            furnish=lambda: save_tokenizer(corpus.tokenizer, run.tokenizer_path),
            source_names=[source.name for source in corpus.sources],
            bytes_per_token=corpus.bytes_per_token,
            layout={
                "num_workers": process["cluster"].num_workers,
                "num_replicas": int(strategy.num_replicas_in_sync),
                "microbatch_size": parts.microbatch_size,
                "parallel_microbatches": parts.num_side_by_side,
            },
            facts={
                "num_params": model.num_params(),
                "corpus_sha256": corpus.corpus_sha256,
                "transport": distribution.transport_of(strategy),
            },
            config_yaml=to_yaml(config, without=["run_dir"]),
            **process,
        )
    )
    for text in samples:
        say(f"\n--- a sample ---\n{text}\n---\n")
    say(run.next_steps())
    return summary


@dataclass(frozen=True)
class Parts:
    """What a run is made of, wired together under one strategy."""

    model: "GPT"
    optimizer: "Optimizer"
    train_step: "TrainStep"
    row_losses: "RowLosses"
    evaluator: "Evaluator"
    order: "Order"
    batches_from: Callable[[int, Collection[int]], Iterator[Any]]  # (step, positions left out) -> batches from it on
    microbatch_size: int  # sequences of one forward pass on one replica
    num_side_by_side: int  # micro-batches that a replica computes at the same time
    compilation: "Compilation"

    @property
    def weights(self) -> "WeightSets":
        """The variables of the run."""
        from tfdp.weights import WeightSets

        return WeightSets(self.model.named_weights(), self.model.named_frozen_weights(), self.optimizer.named_state())


def _of_recipe(config: Config, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of that name of the recipe that the configuration names, or else this one.

    `tfdp.evaluate`, `generate` and `replay` ask that recipe too, so they use what the training used.
    """
    return getattr(import_trainer(config.trainer), function.__name__, function)


def make_model(config: Config, vocab_size: int, fuse: bool) -> "GPT":
    """The model with its initial weights; called inside the scope of the strategy that will use it.

    Args:
      vocab_size: of the tokenizer.
      fuse: whether XLA compiles what lies between the matrix products: `Compilation.parts`.
    """
    from tfdp.gpt import GPT

    return GPT(config.model, vocab_size, config.seed, config.training.precision, config.training.remat, fuse)


def num_side_by_side(config: Config, corpus: "Corpus", num_workers: int) -> int:
    """Micro-batches that each replica computes at the same time."""
    from tfdp import distribution, estimates

    num_params = estimates.num_params(estimates.weight_shapes(config.model, corpus.tokenizer.vocab_size))
    context_length = config.model.context_length
    return distribution.num_side_by_side(config.distribution, config.training, num_workers, num_params, context_length)


def build(config: Config, corpus: "Corpus", strategy: Any) -> Parts:
    """Makes the model with its initial weights, its step, its evaluation and its batches; runs nothing.

    Raises:
      ConfigError: the global batch cannot be cut among the replicas of this strategy.
    """
    from tfdp import data, distribution, estimates
    from tfdp.compilation import Compilation
    from tfdp.evaluation import RowLosses
    from tfdp.optimizer import Optimizer, make_schedule
    from tfdp.sequences import sequences_of
    from tfdp.step import StepRules, TrainStep
    from tfdp.tasks.causal_lm import next_token_loss, next_token_losses

    training, num_sources = config.training, len(corpus.sources)
    document_start = corpus.tokenizer.end_of_text if config.data.document_attention else None
    reduction = config.distribution.reduction
    side_by_side = _of_recipe(config, num_side_by_side)(config, corpus, distribution.num_workers(strategy))
    microbatch_size = distribution.microbatch_size(strategy, training, reduction, side_by_side)
    on_gpu, chunk_size = distribution.on_gpu(strategy), training.loss_chunk_size
    largest = estimates.largest_matrix(config.model, corpus.tokenizer.vocab_size)
    compilation = Compilation.choose(training.jit_compile, training.precision, on_gpu, largest)
    with strategy.scope():
        model = _of_recipe(config, make_model)(config, corpus.tokenizer.vocab_size, compilation.parts)
        optimizer = Optimizer(config.optimizer, model.trainable_variables)
    train_step = TrainStep(
        strategy,
        next_token_loss(model, config.seed, document_start, num_sources, chunk_size, compilation.parts),
        optimizer,
        make_schedule(config.optimizer, training.steps),
        training.global_batch_size,
        microbatch_size,
        StepRules(
            clip_norm=config.optimizer.clip_norm,
            reduction=reduction,
            verify_every=training.verify_every,
            spike_threshold=training.spike_threshold,
            skip_spikes=training.on_spike == "skip",
            wire_dtype=config.distribution.wire_dtype,
            bytes_per_pack=config.distribution.bytes_per_pack,
            scales_loss=training.precision == "float16",
        ),
        compilation,
        num_sources,
        side_by_side,
    )
    rows_loss = next_token_losses(model, config.seed, document_start, chunk_size, compilation.parts)
    row_losses = RowLosses(strategy, rows_loss, microbatch_size, compilation.whole)
    rows = training.rows_of_evaluation
    evaluate = _of_recipe(config, make_evaluator)
    evaluator = evaluate(config, corpus, strategy, model, rows, compilation, side_by_side)
    order = data.Order(
        [sequences_of(split, config.model.context_length, config.data.sequences) for split in corpus.train],
        [source.weight for source in corpus.sources],
        config.data.partition,
        config.seed,
        training.global_batch_size,
    )

    def batches_from(step: int, left_out: Collection[int]) -> Iterator[Any]:
        return iter(data.train_batches(strategy, order, step, left_out))

    return Parts(
        model,
        optimizer,
        train_step,
        row_losses,
        evaluator,
        order,
        batches_from,
        microbatch_size,
        side_by_side,
        compilation,
    )


def make_evaluator(
    config: Config,
    corpus: "Corpus",
    strategy: Any,
    model: "GPT",
    rows: int,
    compilation: "Compilation",
    num_side_by_side: int = 1,
) -> "Evaluator":
    """Evaluates a model on the validation text of all sources, `rows` sequences in a forward pass of each replica."""
    from tfdp.evaluation import Evaluator, ValidationSet
    from tfdp.sequences import sequences_of
    from tfdp.tasks.causal_lm import next_token_loss

    length, form = config.model.context_length, config.data.sequences
    splits = {source.name: source.shards.validation for source in corpus.sources}
    sets = [ValidationSet(name, sequences_of(split, length, form), split.num_bytes) for name, split in splits.items()]
    document_start = corpus.tokenizer.end_of_text if config.data.document_attention else None
    chunk_size = config.training.loss_chunk_size
    loss = next_token_loss(model, None, document_start, len(sets), chunk_size, compilation.parts)
    return Evaluator(strategy, task_of(config, corpus), loss, sets, rows, compilation.whole, num_side_by_side)


def task_of(config: Config, corpus: "Corpus") -> "CausalLM":
    """What is learned: the next token, of all before it or of those of its document."""
    from tfdp.tasks.causal_lm import CausalLM

    return CausalLM(corpus.tokenizer.end_of_text if config.data.document_attention else None)


def shared_facts(config: Config, corpus: "Corpus", strategy: Any) -> dict[str, Any]:
    """What all workers must have in common: every key but where each keeps its cache, text, code and devices."""
    from tfdp import distribution

    keys = flatten(config)
    del keys["data.cache_dir"]
    return {
        **keys,
        "split_sha256": corpus.split_sha256,
        "code_sha256": code_sha256(Path(__file__).parent),
        **distribution.shared_facts(strategy),
    }


def identity(config: Config, corpus: "Corpus") -> dict[str, Any]:
    """What two processes must have in common to be one run: the shapes, the data and its order."""
    free = {"dropout", "init_stddev"}  # may change on the way: they shape neither tensors nor data
    model = {f"model.{key}": value for key, value in asdict(config.model).items() if key not in free}
    return {
        **model,
        "data.tokenizer": corpus.tokenizer.fingerprint,
        "data.sequences": config.data.sequences,
        "data.document_attention": config.data.document_attention,
        "data.partition": config.data.partition,
        "corpus_sha256": corpus.corpus_sha256,
        "split_sha256": corpus.split_sha256,
        "optimizer.name": config.optimizer.name,
        "training.global_batch_size": config.training.global_batch_size,
        "seed": config.seed,
    }

"""This trainer: the recipe's own step, pipeline, optimizer and clipping, as `tfdp.train` runs them."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from tfdp.benchmarking.pace import Pace
from tfdp.benchmarking.shapes import Shape, token_ids
from tfdp.config.sections import DistributionConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tfdp.data.shards import Split
from tfdp.recipe import import_recipe
from tfdp.system.startup import load_tensorflow

_STEPS_OF_CALL = TrainingConfig().log_every  # a run goes back to Python at each line that it logs


@dataclass(frozen=True)
class _Ids:
    """The part of a tokenizer that training looks at."""

    vocab_size: int
    end_of_text: int = 0


@dataclass(frozen=True)
class _Shards:
    train: Split
    validation: Split


def run(shape: Shape, variant: str, num_replicas: int, pace: Pace) -> None:
    """Trains steps as they are asked for; never returns."""
    load_tensorflow()
    train(_config(shape, variant, num_replicas), token_ids(shape), shape.vocab_size, pace)


def train(
    config: Any, ids: np.ndarray, vocab_size: int, pace: Pace, prepare: Callable[[Any], Any] = lambda _components: None
) -> None:
    """Trains the model of a recipe's configuration on ids, in steps as they are asked for; never returns.

    Args:
      config: of a recipe, such as causal_lm.
      ids: of tokens, flat.
      vocab_size: largest id, and one more.
      pace: asks for steps.
      prepare: called with the recipe's components; what it returns is kept as long as there are steps.
    """
    from tfdp import assembly
    from tfdp.data.sources import Corpus, Source
    from tfdp.parallel import collectives, distribution
    from tfdp.parallel.cluster_spec import find_cluster
    from tfdp.reporting import hardware

    split = Split([ids], num_documents=1, num_bytes=len(ids))
    shards: Any = _Shards(split, split)
    tokenizer: Any = _Ids(vocab_size)
    corpus = Corpus([Source("ids", Fraction(1), shards)], tokenizer)
    recipe, cluster = import_recipe(config.trainer), find_cluster(config.distribution)
    parallel = assembly.parallel_microbatches(recipe, config, corpus, cluster.num_workers)
    strategy = distribution.make_strategy(config.distribution, cluster, parallel)
    distribution.connect_workers(strategy, config.distribution, cluster)
    components = assembly.build(recipe, config, corpus, strategy, parallel)
    if collectives.on_gpu(strategy):
        pace.device_memory = hardware.peak_gpu_memory
    held = prepare(components)
    batches, step = components.batches_from(0, ()), 0
    while True:
        count = components.train_step.boundary(step + min(pace.wanted, _STEPS_OF_CALL)) - step
        done = len(components.train_step(batches, step, count).loss)
        if done < count:
            raise RuntimeError(f"step {step + done + 1} was refused")
        step += done
        pace.done(done)
    del held


def model_config(shape: Shape) -> ModelConfig:
    """GPT-2's architecture."""
    return ModelConfig(
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        model_dim=shape.model_dim,
        context_length=shape.context_length,
        position="learned",
        norm="layer_norm",
        activation="gelu",
        use_bias=True,
        qk_norm=False,
        zero_init=False,
        tie_embeddings=True,
    )


def _config(shape: Shape, variant: str, num_replicas: int) -> Any:
    precision: Any
    precision, _, wire = variant.partition("+")
    return import_recipe("causal_lm").Config(
        model=model_config(shape),
        optimizer=OptimizerConfig(name="adamw", learning_rate=3e-4, schedule="constant", warmup_steps=0),
        training=TrainingConfig(
            steps=1_000_000, global_batch_size=shape.num_rows, precision=precision, sample_tokens=0
        ),
        distribution=DistributionConfig(num_replicas=num_replicas, wire_dtype="bfloat16" if wire else "float32"),
    )

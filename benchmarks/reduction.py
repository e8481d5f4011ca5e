"""What one order of summing costs, canonical against fast: `python benchmarks/reduction.py [ROUNDS]`.

The default model and batch (16 sequences) on 2 and on 4 replicas of one process, and on one replica that accumulates 4
micro-batches. Each round runs 10 steps of each layout under each reduction. Medians over the rounds.
"""

import sys
import time
from typing import Any

import numpy as np

from tfdp.system.startup import load_tensorflow

STEPS_OF_ROUND = 10
LAYOUTS = {"2 replicas": (2, 8), "4 replicas": (4, 4), "accumulation 4": (1, 4)}  # (num_replicas, microbatch_size)
REDUCTIONS = ("fast", "canonical")


def make_step(num_replicas: int, microbatch_size: int, reduction: str) -> tuple[Any, Any]:
    """A step of the default job in a layout, with weights of its own, and endless batches for it."""
    import tensorflow as tf

    from tfdp.config.sections import DistributionConfig, ModelConfig, OptimizerConfig, TrainingConfig
    from tfdp.models.gpt import GPT
    from tfdp.optim.optimizer import Optimizer
    from tfdp.optim.schedule import make_schedule
    from tfdp.parallel import distribution
    from tfdp.parallel.batch_layout import BatchLayout
    from tfdp.tasks.causal_lm import next_token_loss
    from tfdp.training.compilation import Compilation
    from tfdp.training.step import StepRules, TrainStep

    training, config, rows = TrainingConfig(), OptimizerConfig(), TrainingConfig().global_batch_size
    strategy = distribution.make_strategy(DistributionConfig(num_replicas=num_replicas, reduction=reduction))  # type: ignore[arg-type]
    with strategy.scope():
        model = GPT(ModelConfig(), 256)
        optimizer = Optimizer(config, model.trainable_variables)
    train_step = TrainStep(
        strategy,
        next_token_loss(model),
        optimizer,
        make_schedule(config, 1_000_000),
        BatchLayout(rows, microbatch_size),
        StepRules(config.clip_norm, reduction=reduction, verify_every=training.verify_every),
        Compilation.choose(training.jit_compile, training.precision, False, largest=0),
    )
    tokens = np.random.default_rng(0).integers(0, 256, (rows, ModelConfig().context_length + 1)).astype(np.int32)
    batch = {"tokens": tf.constant(tokens), "position": tf.range(rows, dtype=tf.int64)}
    dataset = tf.data.Dataset.from_tensor_slices(batch).repeat().batch(rows, drop_remainder=True)
    return train_step, iter(strategy.experimental_distribute_dataset(dataset))


def main() -> None:
    load_tensorflow()

    from tfdp.config.sections import DistributionConfig
    from tfdp.parallel import distribution

    num_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    distribution.make_strategy(DistributionConfig(num_replicas=4))  # as many devices as the widest layout needs
    runs = {
        (layout, reduction): make_step(*LAYOUTS[layout], reduction) for layout in LAYOUTS for reduction in REDUCTIONS
    }
    milliseconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for train_step, batches in runs.values():
        train_step(batches, 0, 3)  # traces and compiles
    for index in range(num_rounds):
        for key, (train_step, batches) in runs.items():
            started = time.perf_counter()
            train_step(batches, 3 + index * STEPS_OF_ROUND, STEPS_OF_ROUND)
            milliseconds[key].append(1e3 * (time.perf_counter() - started) / STEPS_OF_ROUND)
    for layout in LAYOUTS:
        fast, canonical = (float(np.median(milliseconds[layout, reduction])) for reduction in REDUCTIONS)
        print(f"{layout:<14}  fast {fast:.2f} ms a step, canonical {canonical:.2f} ms, ratio {canonical / fast:.3f}")


if __name__ == "__main__":
    main()

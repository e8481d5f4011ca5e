"""What comparing the weights of all replicas costs: `python benchmarks/sentinel.py [ROUNDS]`.

The default model and batch on 2 replicas. Each round runs 100 steps with each of three intervals: never, every 100
steps (the default, so that a round holds one comparison) and every step. Medians over the rounds.
"""

import sys
import time
from typing import Any

import numpy as np

from tfdp.system.startup import load_tensorflow

STEPS_OF_ROUND = 100


def make_step(strategy: Any, verify_every: int) -> Any:
    """A step of the default job under a strategy, with weights of its own."""
    from tfdp.config.sections import ModelConfig, OptimizerConfig, TrainingConfig
    from tfdp.models.gpt import GPT
    from tfdp.optim.optimizer import Optimizer
    from tfdp.optim.schedule import make_schedule
    from tfdp.parallel.batch_layout import BatchLayout
    from tfdp.tasks.causal_lm import next_token_loss
    from tfdp.training.compilation import Compilation
    from tfdp.training.step import StepRules, TrainStep

    training, config = TrainingConfig(), OptimizerConfig()
    with strategy.scope():
        model = GPT(ModelConfig(), 256)
        optimizer = Optimizer(config, model.trainable_variables)
    return TrainStep(
        strategy,
        next_token_loss(model),
        optimizer,
        make_schedule(config, 1_000_000),
        BatchLayout(training.global_batch_size, training.global_batch_size // int(strategy.num_replicas_in_sync)),
        StepRules(config.clip_norm, verify_every=verify_every),  # no judge of spikes: one batch for ever ends in noise
        Compilation.choose(training.jit_compile, training.precision, False, largest=0),
    )


def endless_batches(strategy: Any) -> Any:
    """The same random batch for ever."""
    import tensorflow as tf

    from tfdp.config.sections import ModelConfig, TrainingConfig

    rows = TrainingConfig().global_batch_size
    tokens = np.random.default_rng(0).integers(0, 256, (rows, ModelConfig().context_length + 1)).astype(np.int32)
    batch = {"tokens": tf.constant(tokens), "position": tf.range(rows, dtype=tf.int64)}
    dataset = tf.data.Dataset.from_tensor_slices(batch).repeat().batch(rows, drop_remainder=True)
    return iter(strategy.experimental_distribute_dataset(dataset))


def main() -> None:
    load_tensorflow()

    from tfdp.config.sections import DistributionConfig, TrainingConfig
    from tfdp.parallel import distribution

    num_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    strategy = distribution.make_strategy(DistributionConfig(num_replicas=2))
    batches = endless_batches(strategy)
    default = TrainingConfig().verify_every
    steps = {verify_every: make_step(strategy, verify_every) for verify_every in (0, default, 1)}
    for train_step in steps.values():
        train_step(batches, 0, 3)  # traces and compiles
    seconds: dict[int, list[float]] = {verify_every: [] for verify_every in steps}
    for index in range(num_rounds):
        for verify_every in list(steps)[index % 3 :] + list(steps)[: index % 3]:
            started = time.perf_counter()
            results = steps[verify_every](batches, STEPS_OF_ROUND * (index + 1), STEPS_OF_ROUND)
            seconds[verify_every].append((time.perf_counter() - started) / STEPS_OF_ROUND)
            assert len(results.loss) == STEPS_OF_ROUND, results
    median = {verify_every: float(np.median(values)) for verify_every, values in seconds.items()}
    names = {0: "never", default: f"every {default} steps", 1: "every step"}
    for verify_every, name in names.items():
        ratio, spread = median[verify_every] / median[0], np.ptp(seconds[verify_every])
        print(f"{name:<15}  {1e3 * median[verify_every]:.2f} ms a step (spread {1e3 * spread:.2f}), ratio {ratio:.4f}")
    measured, derived = median[default] / median[0] - 1, (median[1] - median[0]) / median[0] / default
    print(f"overhead every {default} steps: {measured:.3%} measured, {derived:.3%} derived from that of every step")


if __name__ == "__main__":
    main()

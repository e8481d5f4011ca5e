"""Steps beside an asynchronous save, against quiet ones: `python benchmarks/saving.py [ROUNDS]`.

10.8 M parameters (6 layers, 6 heads, 384 wide, 64 context, 8 rows), AdamW, one replica. Each round runs ten quiet
steps, then steps for as long as a save is being written.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tfdp.system.startup import load_tensorflow


def main() -> None:
    load_tensorflow()
    import tensorflow as tf

    from tfdp.config.sections import DistributionConfig, ModelConfig, OptimizerConfig
    from tfdp.models.gpt import GPT
    from tfdp.optim.optimizer import Optimizer
    from tfdp.optim.schedule import make_schedule
    from tfdp.parallel import distribution
    from tfdp.parallel.batch_layout import BatchLayout
    from tfdp.tasks.causal_lm import next_token_loss
    from tfdp.training.checkpoint import Checkpoint, CheckpointFolder
    from tfdp.training.saver import AsyncSaver
    from tfdp.training.step import StepRules, TrainStep
    from tfdp.training.weights import snapshot

    num_rounds, context_length, rows = int(sys.argv[1]) if len(sys.argv) > 1 else 8, 64, 8
    config = OptimizerConfig(name="adamw", learning_rate=1e-3, schedule="constant")
    strategy = distribution.make_strategy(DistributionConfig())
    with strategy.scope():
        model = GPT(ModelConfig(num_layers=6, num_heads=6, model_dim=384, context_length=context_length), 256)
        optimizer = Optimizer(config, model.trainable_variables)
    train_step = TrainStep(
        strategy,
        next_token_loss(model),
        optimizer,
        make_schedule(config, 1000),
        BatchLayout(rows, rows),
        StepRules(1.0),
        compilation=True,
    )
    tokens = np.random.default_rng(0).integers(0, 256, (rows, context_length + 1)).astype(np.int32)
    batch = {"tokens": tf.constant(tokens), "position": tf.range(rows, dtype=tf.int64)}
    batches = iter(strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors(batch).repeat()))

    num_steps = 0

    def step_milliseconds() -> float:
        nonlocal num_steps
        started = time.perf_counter()
        train_step(batches, num_steps, 1)
        num_steps += 1
        return 1e3 * (time.perf_counter() - started)

    for _ in range(5):
        step_milliseconds()
    quiet, saving, copies = [], [], []
    with tempfile.TemporaryDirectory() as folder, AsyncSaver(CheckpointFolder(Path(folder), keep=1)) as saver:
        for index in range(num_rounds):
            quiet += [step_milliseconds() for _ in range(10)]
            started = time.perf_counter()
            weights, state = snapshot(model.named_weights()), snapshot(optimizer.named_state())
            copies.append(1e3 * (time.perf_counter() - started))
            saver.save(Checkpoint(weights, state, {"step": index, "validation_loss": None}))
            while saver.is_saving():
                saving.append(step_milliseconds())
    median = np.median(quiet)
    print(f"{model.num_params():,} parameters; the copy to host memory takes {np.median(copies):.0f} ms")
    for name, values in (("quiet", quiet), ("during a save", saving)):
        p95 = np.percentile(values, 95)
        print(
            f"{name:<13}  {len(values):>4} steps  median {np.median(values):.0f} ms ({np.median(values) / median:.2f})"
            f"  p95 {p95:.0f} ms ({p95 / median:.2f})"
        )


if __name__ == "__main__":
    main()

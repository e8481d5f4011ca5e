"""float16: the scale of the loss, on one replica and over several."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import DistributionConfig, ModelConfig, OptimizerConfig
from tfdp.data.shards import ABSENT
from tfdp.models.gpt import GPT
from tfdp.ops.cross_entropy import projected_cross_entropy
from tfdp.optim.optimizer import Optimizer
from tfdp.optim.schedule import make_schedule
from tfdp.parallel import distribution
from tfdp.parallel.batch_layout import BatchLayout
from tfdp.tasks.causal_lm import next_token_loss
from tfdp.training import loss_scale
from tfdp.training.step import StepRules, TrainStep
from trainers.causal_lm import Config, train

ROWS, LENGTH, VOCABULARY = 4, 9, 32


def make_step(num_replicas: int = 1, **rules: object) -> tuple[TrainStep, GPT, tf.distribute.Strategy]:
    strategy = distribution.make_strategy(DistributionConfig(num_replicas=num_replicas))
    config = OptimizerConfig(name="sgd", learning_rate=0.1, warmup_steps=0, schedule="constant")
    with strategy.scope():
        model = GPT(ModelConfig(num_layers=1, num_heads=2, model_dim=16, context_length=8), VOCABULARY, 0, "float16")
        optimizer = Optimizer(config, model.trainable_variables)
    rules = {"scales_loss": True, "verify_every": 1, **rules}
    loss, schedule = next_token_loss(model), make_schedule(config, 10)
    cut, step_rules = BatchLayout(ROWS, 2), StepRules(1.0, **rules)  # type: ignore[arg-type]
    step = TrainStep(strategy, loss, optimizer, schedule, cut, step_rules, False)
    return step, model, strategy


def batches(strategy: tf.distribute.Strategy, tokens: np.ndarray) -> object:
    """The same batch again and again, each row with the number of its sequence."""
    rows = {"tokens": tf.constant(tokens, tf.int32), "position": tf.range(len(tokens), dtype=tf.int64)}
    dataset = tf.data.Dataset.from_tensor_slices(rows).repeat().batch(len(tokens), True)
    return iter(strategy.experimental_distribute_dataset(dataset))


def some_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH))


def weights_of(model: GPT) -> list[np.ndarray]:
    return [variable.numpy() for variable in model.trainable_variables]


def test_an_overflow_repeats_the_step_at_half_the_scale() -> None:
    found: dict[int, Any] = {}
    for exponent in (4, 22):
        step, model, strategy = make_step()
        step.scaling = np.array([2.0**exponent, 0, 0], np.float32)
        results = step(batches(strategy, some_tokens()), 0, 3)
        found[exponent] = results, weights_of(model), step.scaling
    results, weights, scaling = found[22]
    assert scaling[2] >= 1, "no overflow: nothing is tested"
    assert scaling[0] == 2.0 ** (22 - scaling[2])
    assert found[4][2].tolist() == [2.0**4, 3, 0]
    assert len(results.loss) == 3
    assert not results.skipped
    np.testing.assert_allclose(results.loss, found[4][0].loss, rtol=1e-4)
    np.testing.assert_allclose(results.grad_norm, found[4][0].grad_norm, rtol=1e-2)
    for one, other in zip(weights, found[4][1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_an_overflow_on_one_replica_is_one_on_all() -> None:
    tokens = some_tokens()
    tokens[ROWS // 2 :] = ABSENT  # the second replica has nothing to learn from, and no overflow of its own
    step, model, strategy = make_step(num_replicas=2)
    step.scaling = np.array([2.0**22, 0, 0], np.float32)
    results = step(batches(strategy, tokens), 0, 2)
    assert step.scaling[2] >= 1
    assert len(results.loss) == 2
    assert step.verify(2) is None
    alone, other, one_device = make_step()
    expected = alone(batches(one_device, tokens), 0, 2)
    np.testing.assert_allclose(results.loss, expected.loss, rtol=1e-4)
    for ours, theirs in zip(weights_of(model), weights_of(other), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_what_no_scale_helps_is_a_spike_and_leaves_the_scale_alone() -> None:
    step, model, strategy = make_step()
    model.trainable_variables[0].assign(tf.fill(model.trainable_variables[0].shape, np.nan))
    results = step(batches(strategy, some_tokens()), 0, 3)
    assert results.spike is not None
    assert not len(results.loss)
    assert step.scaling.tolist() == [loss_scale.FIRST, 0, 0]


def test_the_scale_grows_after_enough_steps() -> None:
    scaling = tf.constant([8.0, loss_scale.STEPS_TO_GROW - 2, 5.0])
    scaling = loss_scale.after_step(scaling)
    assert scaling.numpy().tolist() == [8, loss_scale.STEPS_TO_GROW - 1, 5]
    scaling = loss_scale.after_step(scaling)
    assert scaling.numpy().tolist() == [16, 0, 5]
    assert loss_scale.after_overflow(scaling).numpy().tolist() == [8, 0, 6]
    most = loss_scale.after_step(tf.constant([loss_scale.MOST, loss_scale.STEPS_TO_GROW, 0.0]))
    assert most.numpy().tolist() == [loss_scale.MOST, 0, 0]


@pytest.mark.parametrize("chunk_size", [0, 16])
def test_a_table_gradient_may_be_larger_than_float16(chunk_size: int) -> None:
    """Summed over 4,096 tokens that all have the same target, before any loss scale can make it smaller."""
    features = tf.fill([64, 64, 8], tf.constant(20.0, tf.float16))
    table = tf.Variable(tf.zeros([4, 8]))
    targets = tf.zeros([64, 64], tf.int32)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(projected_cross_entropy(features, table, targets, chunk_size))
    gradient = tape.gradient(loss, table).numpy()
    np.testing.assert_allclose(gradient[0], -0.75 * 20 * 4096, rtol=1e-3)
    np.testing.assert_allclose(gradient[1:], 0.25 * 20 * 4096, rtol=1e-3)


def logged(config: Config, key: str) -> list[float]:
    rows = [json.loads(line) for line in Path(str(config.run_dir), "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.mark.slow
def test_a_run_in_float16_resumes_with_its_scale_and_stays_near_float32(tiny_config: Callable[..., Config]) -> None:
    training = {"precision": "float16", "steps": 12}
    whole, cut = tiny_config("whole", training=training), tiny_config("cut", training=training)
    expected = train(whole)
    train(tiny_config("cut", training={**training, "steps": 6}))
    assert train(cut)["state_sha256"] == expected["state_sha256"]
    for key in ("loss", "loss_scale", "num_overflows"):
        assert len(logged(whole, key)) == 12
        assert logged(cut, key) == logged(whole, key)
    exact = tiny_config("exact", training={"steps": 12})
    train(exact)
    assert not logged(exact, "loss_scale")
    np.testing.assert_allclose(logged(whole, "loss"), logged(exact, "loss"), rtol=2e-3)

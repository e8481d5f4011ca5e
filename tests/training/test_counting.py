"""The loss and the gradient are sums over valid tokens, divided once by their global number."""

import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import DistributionConfig, ModelConfig, OptimizerConfig
from tfdp.data.sequences import PackedSequences
from tfdp.data.shards import Split
from tfdp.models.gpt import GPT
from tfdp.optim.optimizer import Optimizer
from tfdp.optim.schedule import make_schedule
from tfdp.parallel import distribution
from tfdp.parallel.batch_layout import BatchLayout
from tfdp.tasks.causal_lm import CausalLM, next_token_loss, next_token_losses
from tfdp.tasks.task import evaluation_sums
from tfdp.training.evaluation import Evaluator, RowLosses, ValidationSet
from tfdp.training.step import StepRules, TrainStep

MODEL = ModelConfig(num_layers=2, num_heads=2, model_dim=16, context_length=8, zero_init=False, init_stddev=0.2)
ROWS, VOCABULARY = 8, 32
EMPTY_ROWS = {"nowhere": [], "half": [4, 5, 6, 7], "all but one": [0, 1, 2, 4, 5, 6, 7]}


def masked_tokens(seed: int, empty_rows: list[int]) -> np.ndarray:
    """Random windows, a third of whose tokens are absent; the empty rows have none that is valid."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, VOCABULARY, (ROWS, MODEL.context_length + 1)).astype(np.int32)
    tokens[generator.random(tokens.shape) < 1 / 3] = -1
    tokens[empty_rows] = -1
    return tokens


def reference(model: GPT, tokens: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """Loss and gradients, from the float32 gradients of single rows, added and divided in float64."""
    totals, loss_sum, count = [np.zeros(v.shape) for v in model.trainable_variables], 0.0, 0.0
    for row in tokens:
        if not np.any(row[1:] >= 0):
            continue
        with tf.GradientTape() as tape:
            row_sum, row_count = next_token_loss(model)({"tokens": tf.constant(row[None])}, tf.constant(0, tf.int64))
        gradients = tape.gradient(row_sum, [variable.value for variable in model.trainable_variables])
        totals = [
            t + tf.convert_to_tensor(g).numpy().astype(np.float64) for t, g in zip(totals, gradients, strict=True)
        ]
        loss_sum, count = loss_sum + float(row_sum[0]), count + float(row_count[0])
    return loss_sum / count, [total / count for total in totals]


def iterator(strategy: tf.distribute.Strategy, tokens: np.ndarray) -> object:
    batch = {"tokens": tf.constant(tokens), "position": tf.range(len(tokens), dtype=tf.int64)}
    dataset = tf.data.Dataset.from_tensors(batch).unbatch().repeat().batch(len(tokens), True)
    return iter(strategy.experimental_distribute_dataset(dataset))


@pytest.mark.parametrize(("num_replicas", "microbatch_size"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_the_gradient_of_any_mask_is_the_sum_over_valid_tokens(num_replicas: int, microbatch_size: int) -> None:
    strategy = distribution.make_strategy(DistributionConfig(num_replicas=num_replicas))
    config = OptimizerConfig(name="sgd", learning_rate=1.0, warmup_steps=0, schedule="constant")
    with strategy.scope():
        model = GPT(MODEL, VOCABULARY)
        optimizer = Optimizer(config, model.trainable_variables)
    loss, schedule = next_token_loss(model), make_schedule(config, 10)
    cut = BatchLayout(ROWS, microbatch_size)
    step = TrainStep(strategy, loss, optimizer, schedule, cut, StepRules(), compilation=False)
    for seed, (name, empty_rows) in enumerate(EMPTY_ROWS.items()):
        tokens = masked_tokens(seed, empty_rows)
        expected_loss, expected = reference(model, tokens)
        before = [variable.numpy().astype(np.float64) for variable in model.trainable_variables]
        results = step(iterator(strategy, tokens), 0, 1)
        applied = [old - variable.numpy() for old, variable in zip(before, model.trainable_variables, strict=True)]
        norm = np.sqrt(sum(np.sum(gradient**2) for gradient in expected))
        error = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(applied, expected, strict=True)))
        assert results.num_tokens[0] == np.sum(tokens[:, 1:] >= 0), name
        assert results.loss[0] == pytest.approx(expected_loss, rel=1e-6), name
        assert results.grad_norm[0] == pytest.approx(norm, rel=1e-5), name
        assert error / norm < 1e-5, name


@pytest.mark.parametrize("num_tokens", [97, 1003])
def test_the_validation_loss_is_identical_for_any_number_of_replicas(num_tokens: int) -> None:
    tokens = np.random.default_rng(num_tokens).integers(0, VOCABULARY, num_tokens).astype(np.uint16)
    split = Split([tokens], num_documents=1, num_bytes=num_tokens)
    found = {}
    for num_replicas in (1, 2, 3, 4):
        strategy = distribution.make_strategy(DistributionConfig(num_replicas=num_replicas))
        with strategy.scope():
            model = GPT(MODEL, VOCABULARY)
        sets = [ValidationSet("all", PackedSequences(split, MODEL.context_length), num_tokens)]
        evaluate = Evaluator(strategy, CausalLM(), evaluation_sums(CausalLM(), model), sets, 3, jit_compile=False)
        found[num_replicas] = evaluate()
    assert {result.num_tokens for result in found.values()} == {num_tokens - 1}
    assert len({result.metrics["loss"].value for result in found.values()}) == 1


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_the_losses_of_rows_add_up_to_that_of_the_step(num_replicas: int) -> None:
    strategy = distribution.make_strategy(DistributionConfig(num_replicas=num_replicas))
    with strategy.scope():
        model = GPT(MODEL, VOCABULARY)
    tokens = masked_tokens(7, [3])
    sums, counts = RowLosses(strategy, next_token_losses(model), 2, False)(iterator(strategy, tokens), 0)
    assert counts.tolist() == np.sum(tokens[:, 1:] >= 0, axis=1).tolist()
    for row in range(ROWS):
        batch = {"tokens": tf.constant(tokens[row : row + 1])}
        expected, _ = next_token_loss(model)(batch, tf.constant(0, tf.int64))
        assert sums[row] == pytest.approx(float(expected[0]), rel=1e-6)

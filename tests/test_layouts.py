"""One run, any layout: replicas and accumulation change nothing but the order of a sum."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import DistributionConfig, ModelConfig, OptimizerConfig
from tfdp.models.gpt import GPT
from tfdp.optim.optimizer import Optimizer
from tfdp.optim.schedule import make_schedule
from tfdp.parallel import distribution
from tfdp.parallel.batch_layout import BatchLayout
from tfdp.parallel.synchronizer import AllReduce
from tfdp.tasks.causal_lm import next_token_loss
from tfdp.training.step import StepRules, TrainStep
from trainers import causal_lm
from trainers.causal_lm import Config

LAYOUTS = {  # name: (num_replicas, microbatch_size); the global batch has 12 sequences
    "1 replica": (1, None),
    "2 replicas": (2, None),
    "4 replicas": (4, None),
    "accumulation 2": (1, 6),
    "accumulation 4": (1, 3),
    "2 replicas, accumulation 3": (2, 2),
}


def logged(run_dir: str | None, key: str) -> np.ndarray:
    rows = [json.loads(line) for line in Path(str(run_dir), "metrics.jsonl").read_text().splitlines()]
    return np.array([row[key] for row in rows if key in row])


@pytest.mark.parametrize(
    ("optimizer", "jit_compile", "layouts"),
    [
        ("adamw", False, ["1 replica", "2 replicas, accumulation 3"]),  # the default is in test_defaults
        pytest.param("adamw", False, list(LAYOUTS), marks=pytest.mark.slow),
        pytest.param("muon", True, ["1 replica", "2 replicas", "accumulation 4"], marks=pytest.mark.slow),
    ],
)
def test_every_layout_gives_the_same_losses(
    tiny_config: Callable[..., Config], optimizer: str, jit_compile: bool, layouts: list[str]
) -> None:
    losses, validation = {}, {}
    for name in layouts:
        num_replicas, microbatch_size = LAYOUTS[name]
        config = tiny_config(
            name,
            distribution={"num_replicas": num_replicas},
            optimizer={"name": optimizer, "clip_norm": 0.5},
            training={"microbatch_size": microbatch_size, "steps": 60, "jit_compile": jit_compile},
            model={"dropout": 0.1},
        )
        summary = causal_lm.train(config)
        assert summary["num_replicas"] == num_replicas
        assert summary["sequences_seen"] == 60 * 12
        losses[name], validation[name] = logged(config.run_dir, "loss"), summary["validation_loss"]
    reference = losses["1 replica"]
    assert len(reference) == 60
    assert np.sum(logged(tiny_config("1 replica").run_dir, "grad_norm") > 0.5) > 30, "the clip must be active"
    assert reference[-1] < 0.6 * reference[0], "the run must learn something for its losses to mean anything"
    for name in layouts:
        np.testing.assert_allclose(losses[name], reference, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(validation[name], validation["1 replica"], rtol=1e-5, err_msg=name)


def make_step(num_replicas: int, microbatch_size: int, clip_norm: float | None = 1.0, **reduction: object) -> TrainStep:
    strategy = distribution.make_strategy(DistributionConfig(num_replicas=num_replicas))
    config = OptimizerConfig(name="sgd", learning_rate=1.0, warmup_steps=0, schedule="constant")
    with strategy.scope():
        model = GPT(ModelConfig(num_layers=1, num_heads=2, model_dim=16, context_length=8), 32)
        optimizer = Optimizer(config, model.trainable_variables)
    loss = next_token_loss(model)
    schedule = make_schedule(config, 10)
    sums = AllReduce(strategy, optimizer.weights, optimizer.state, **reduction)  # type: ignore[arg-type]
    cut, rules = BatchLayout(8, microbatch_size), StepRules(clip_norm)
    step = TrainStep(strategy, loss, optimizer, schedule, cut, rules, False, synchronizer=sums)
    step.strategy, step.model = strategy, model  # type: ignore[attr-defined]
    return step


def batches(strategy: tf.distribute.Strategy, tokens: np.ndarray) -> object:
    """An iterator that gives the same global batch for ever."""
    dataset = tf.data.Dataset.from_tensors(
        {"tokens": tf.constant(tokens, tf.int32), "position": tf.range(len(tokens), dtype=tf.int64)}
    )
    return iter(strategy.experimental_distribute_dataset(dataset.unbatch().repeat().batch(len(tokens), True)))


def count_reductions(function: object) -> int:
    """Sums over replicas in a traced step and what it calls, the arithmetic inside one replica left out."""
    inner = function.graph.as_graph_def().library.function  # type: ignore[attr-defined]
    inside = ("microbatch_sums", "measure_sums", "apply_group", "cond_")
    outside = [f for f in inner if not any(part in f.signature.name for part in inside)]
    return sum(node.op in {"AddN", "CollectiveReduceV2", "NcclAllReduce"} for f in outside for node in f.node_def)


def trace(step: TrainStep) -> Any:
    arguments = (batches(step.strategy, np.zeros((8, 9), np.int32)), tf.constant(0, tf.int64), tf.constant(1))  # type: ignore[attr-defined]
    return step._run.get_concrete_function(*arguments, tf.constant(step.recent_losses), tf.constant(step.scaling))


def test_no_replica_waits_for_the_clock_of_another() -> None:
    """TensorFlow runs all operations with effects but without a resource one after the other, over the replicas too."""
    counts = []
    for num_replicas in (1, 2):
        functions = trace(make_step(num_replicas, 2)).graph.as_graph_def().library.function
        counts.append(sum(node.op == "Timestamp" for function in functions for node in function.node_def))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("rules", [{}, {"bytes_per_pack": 4096}, {"bytes_per_pack": 1 << 20, "wire_dtype": "bfloat16"}])
def test_a_step_reduces_once_whatever_the_accumulation(rules: dict[str, object]) -> None:
    counts, told = [], set()
    for microbatch_size in (4, 2, 1):
        step = make_step(2, microbatch_size, **rules)
        counts.append(count_reductions(trace(step)))
        told.add((step.num_reductions, step.reduction_bytes))
    num_numbers = sum(int(np.prod(v.shape)) for v in step.model.trainable_variables)  # type: ignore[attr-defined]
    sizes = {None: len(step.model.trainable_variables), 4096: -(-num_numbers // 1024), 1 << 20: 1}  # type: ignore[attr-defined]
    num_packs = sizes[rules.get("bytes_per_pack")]  # type: ignore[index]
    num_bytes = num_numbers * (2 if "wire_dtype" in rules else 4)
    assert counts == [num_packs + 1] * 3  # the packs, and what is told of the step
    assert told == {(num_packs + 1, num_bytes + 3 * 4)}


@pytest.mark.parametrize("num_replicas", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_packs_of_any_size_give_the_same_bits(num_replicas: int) -> None:
    tokens, found = np.random.default_rng(0).integers(0, 32, (8, 9)), []
    for bytes_per_pack in (0, 256, 1 << 20):
        step = make_step(num_replicas, 2, bytes_per_pack=bytes_per_pack)
        step(batches(step.strategy, tokens), 0, 2)  # type: ignore[attr-defined]
        found.append([variable.numpy() for variable in step.model.trainable_variables])  # type: ignore[attr-defined]
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("reduction", "width"), [("fast", 2), ("canonical", 2), ("canonical", 4)])
def test_micro_batches_side_by_side_are_those_one_after_the_other(
    tiny_config: Callable[..., Config], reduction: str, width: int
) -> None:
    found = []
    for parallel in (1, width):
        config = tiny_config(
            str(parallel),
            model={"dropout": 0.1},
            training={"microbatch_size": 3 if reduction == "canonical" else 2, "parallel_microbatches": parallel},
            distribution={"reduction": reduction},
        )
        found.append(causal_lm.train(config))
    for key in ("weights_sha256", "state_sha256", "train_loss", "validation_loss"):
        assert found[0][key] == found[1][key], key


@pytest.mark.slow
def test_packs_of_bfloat16_gradients_are_those_of_single_tensors(tiny_config: Callable[..., Config]) -> None:
    """A bfloat16 model has gradients of both kinds: of its matrices, and of its gains."""
    found = []
    for bytes_per_pack in (0, 512):
        config = tiny_config(
            str(bytes_per_pack),
            training={"precision": "bfloat16", "steps": 3, "jit_compile": "auto"},
            distribution={"num_replicas": 2, "bytes_per_pack": bytes_per_pack},
        )
        found.append(causal_lm.train(config)["state_sha256"])
    assert found[0] == found[1]


def test_bfloat16_on_the_wire_rounds_the_sums_of_replicas() -> None:
    tokens, norms = np.random.default_rng(0).integers(0, 32, (8, 9)), {}
    for wire_dtype in ("float32", "bfloat16"):
        step = make_step(2, 4, wire_dtype=wire_dtype)
        norms[wire_dtype] = step(batches(step.strategy, tokens), 0, 1).grad_norm[0]  # type: ignore[attr-defined]
    assert norms["bfloat16"] != norms["float32"]
    assert norms["bfloat16"] == pytest.approx(norms["float32"], rel=4e-3)


def test_the_step_traces_once() -> None:
    step = make_step(2, 2)
    tokens = np.random.default_rng(0).integers(0, 32, (8, 9))
    for first, count in ((0, 1), (1, 3), (4, 2)):
        step(batches(step.strategy, tokens), first, count)  # type: ignore[attr-defined]
    assert step._run.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_clipping_follows_the_reduction(num_replicas: int) -> None:
    """With clip 1.0 and learning rate 1.0, plain gradient descent moves the weights by exactly norm 1.0."""
    step = make_step(num_replicas, 8 // num_replicas, clip_norm=1e-3)
    tokens = np.random.default_rng(0).integers(0, 32, (8, 9))
    before = [variable.numpy() for variable in step.model.trainable_variables]  # type: ignore[attr-defined]
    results = step(batches(step.strategy, tokens), 0, 1)  # type: ignore[attr-defined]
    after = [variable.numpy() for variable in step.model.trainable_variables]  # type: ignore[attr-defined]
    assert results.grad_norm[0] > 1e-2
    moved = np.sqrt(sum(np.sum((a.astype(np.float64) - b) ** 2) for a, b in zip(after, before, strict=True)))
    assert moved == pytest.approx(1e-3, rel=2e-3)


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_the_loss_is_the_mean_over_all_valid_tokens_also_with_an_empty_replica(num_replicas: int) -> None:
    tokens = np.random.default_rng(1).integers(0, 32, (8, 9)).astype(np.int32)
    tokens[1, 3:] = -1
    tokens[4:, :] = -1  # half of the replicas, or of the rows, have nothing to predict
    step = make_step(num_replicas, 8 // num_replicas)
    logits = step.model(np.maximum(tokens[:, :-1], 0)).numpy().astype(np.float64)  # type: ignore[attr-defined]
    targets = tokens[:, 1:]
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probabilities, np.maximum(targets, 0)[..., None], -1)[..., 0]
    results = step(batches(step.strategy, tokens), 0, 1)  # type: ignore[attr-defined]
    assert results.num_tokens[0] == np.sum(targets >= 0) == 26
    assert results.loss[0] == pytest.approx(-picked[targets >= 0].mean(), rel=1e-6)


def test_a_gradient_that_is_not_finite_is_named_and_not_applied() -> None:
    step = make_step(2, 4)
    tokens = np.random.default_rng(0).integers(0, 32, (8, 9))
    gain = step.model.output_norm.gain  # type: ignore[attr-defined]
    gain.assign(np.full(16, np.inf))
    before = [variable.numpy() for variable in step.model.trainable_variables]  # type: ignore[attr-defined]
    results = step(batches(step.strategy, tokens), 0, 5)  # type: ignore[attr-defined]
    assert len(results.loss) == 0
    assert results.spike is not None
    assert results.spike.tensor == step.model.trainable_variables[0].path  # type: ignore[attr-defined]
    for variable, old in zip(step.model.trainable_variables, before, strict=True):  # type: ignore[attr-defined]
        np.testing.assert_array_equal(variable.numpy(), old)


def test_a_stop_request_ends_the_call_after_its_step() -> None:
    step = make_step(2, 4)
    tokens = np.random.default_rng(0).integers(0, 32, (8, 9))
    assert not step(batches(step.strategy, tokens), 0, 2).stopped  # type: ignore[attr-defined]
    step.request_end()  # as the chief does; between 0 and 1 over all replicas
    results = step(batches(step.strategy, tokens), 2, 50)  # type: ignore[attr-defined]
    assert results.time_is_up and not results.stopped
    assert len(results.loss) == 1
    step.request_stop()
    results = step(batches(step.strategy, tokens), 3, 50)  # type: ignore[attr-defined]
    assert results.stopped and not results.time_is_up
    assert len(results.loss) == 1

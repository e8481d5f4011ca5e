"""Replicas that no longer hold the same weights are found and named."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from workers import start, tiny_arguments

from tfdp.config.sections import DistributionConfig, ModelConfig, OptimizerConfig
from tfdp.models.gpt import GPT
from tfdp.optim.optimizer import Optimizer
from tfdp.optim.schedule import make_schedule
from tfdp.parallel import distribution
from tfdp.parallel.batch_layout import BatchLayout
from tfdp.parallel.consistency import Disagreement, digests, find_disagreement
from tfdp.parallel.synchronizer import AllReduce
from tfdp.system.exits import TrainingError
from tfdp.tasks.causal_lm import next_token_loss
from tfdp.training.step import StepRules, TrainStep
from trainers import causal_lm
from trainers.causal_lm import Config

EVERY = 5


def flip_bit(values: np.ndarray, element: int, bit: int) -> np.ndarray:
    flipped = values.copy()
    flipped.reshape(-1).view(np.uint32)[element] ^= np.uint32(1 << bit)
    return flipped


def test_a_digest_changes_with_every_bit() -> None:
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    original = digests([tf.constant(values)]).numpy()
    assert original.shape == (1, 2)
    assert np.all(original == np.floor(original))
    assert np.all((original >= 0) & (original < 65536))
    for element in (0, 3, 34):
        for bit in range(32):
            changed = digests([tf.constant(flip_bit(values, element, bit))]).numpy()
            assert np.any(changed != original), (element, bit)


def test_a_digest_knows_the_places_of_elements_and_the_sign_of_zero() -> None:
    original = digests([tf.constant([1.0, 2.0, 0.0])]).numpy()
    for other in ([2.0, 1.0, 0.0], [1.0, 2.0, -0.0], [0.0, 1.0, 2.0]):
        assert np.any(digests([tf.constant(other)]).numpy() != original)


def test_xla_gives_the_same_digests() -> None:
    weights = [tf.random.stateless_normal(shape, seed=[0, 1]) for shape in ((300, 7), (11,), (1,))]
    np.testing.assert_array_equal(tf.function(digests, jit_compile=True)(weights), digests(weights))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 1, 2], Disagreement("b", (2,), True)),
        ([3, 1, 1, 1], Disagreement("b", (0,), True)),
        ([1, 2], Disagreement("b", (0, 1), False)),
        ([1, 1, 2, 2], Disagreement("b", (0, 1, 2, 3), False)),
        ([1, 2, 1, 3, 1], Disagreement("b", (1, 3), True)),
    ],
)
def test_the_minority_is_named(values: list[int], expected: Disagreement) -> None:
    found = np.zeros((len(values), 3, 2), np.float32)
    found[:, 1, 1] = values
    found[:, 2, 0] = range(len(values))
    assert find_disagreement(found, ["a", "b", "c"]) == expected


def make_step(num_replicas: int) -> tuple[TrainStep, Optimizer, object]:
    strategy = distribution.make_strategy(DistributionConfig(num_replicas=num_replicas))
    config = OptimizerConfig(name="adamw", learning_rate=1e-3, schedule="constant")
    with strategy.scope():
        model = GPT(ModelConfig(num_layers=3, num_heads=2, model_dim=16, context_length=8), 32)
        model.blocks[2].trainable = False
        optimizer = Optimizer(config, model.trainable_variables)
    rules = StepRules(clip_norm=1.0, verify_every=EVERY)
    frozen, schedule = model.named_frozen_weights().values(), make_schedule(config, 1000)
    sums, cut = AllReduce(strategy, optimizer.weights, [*optimizer.state, *frozen]), BatchLayout(6, 2)
    step = TrainStep(strategy, next_token_loss(model), optimizer, schedule, cut, rules, False, synchronizer=sums)
    tokens = np.random.default_rng(0).integers(0, 32, (6, 9)).astype(np.int32)
    batch = {"tokens": tf.constant(tokens), "position": tf.range(6, dtype=tf.int64)}
    dataset = tf.data.Dataset.from_tensors(batch).repeat().unbatch().batch(6, True)
    return step, optimizer, iter(strategy.experimental_distribute_dataset(dataset))


def corrupt(weight: object, replica: int, element: int, bit: int) -> None:
    """Flips one bit in one replica's copy of a weight."""
    copy = weight.value.values[replica]  # type: ignore[attr-defined]
    copy.assign(flip_bit(copy.numpy(), element, bit))


@pytest.mark.parametrize(
    ("replica", "bit"), [(1, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 31), (2, 23)))]
)
def test_a_flipped_bit_is_found_within_the_interval_by_name(replica: int, bit: int) -> None:
    step, optimizer, batches = make_step(3)
    assert step(batches, 0, 7).disagreement is None
    weight = optimizer.weights[3]
    corrupt(weight, replica, 5, bit)
    results = step(batches, 7, 20)
    assert results.disagreement == Disagreement(weight.path, (replica,), True)
    assert 7 + len(results.loss) == 10  # the next multiple of EVERY; that step was not applied
    assert results.spike is None


def test_verify_looks_at_once_at_weights_state_and_frozen_weights() -> None:
    step, optimizer, batches = make_step(3)
    step(batches, 0, 2)
    assert step.verify(2) is None
    for variable in (step._synchronizer.shared[-1], optimizer.state[4], optimizer.weights[1]):  # each before the last
        corrupt(variable, 2, 0, 0)
        assert step.verify(2) == Disagreement(variable.path, (2,), True)


def test_a_corruption_after_the_last_comparison_is_found_before_the_last_save(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = TrainStep.__call__

    def corrupted(self: TrainStep, batches: object, first_step: int, num_steps: int) -> object:
        if first_step == 13:
            corrupt(self._optimizer.weights[2], 0, 0, 0)
        return call(self, batches, first_step, num_steps)

    monkeypatch.setattr(TrainStep, "__call__", corrupted)
    config = tiny_config("run", training={"steps": 15, "verify_every": 10}, distribution={"num_replicas": 2})
    with pytest.raises(
        TrainingError, match=r"^step 15: .* replica 0, replica 1 disagree; .* there is no checkpoint yet"
    ):
        causal_lm.train(config)


@pytest.mark.parametrize("num_steps", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_clean_steps_raise_no_alarm(num_steps: int) -> None:
    step, _, batches = make_step(3)
    results = step(batches, 0, num_steps)
    assert results.disagreement is None
    assert len(results.loss) == num_steps


@pytest.mark.slow
def test_a_run_ends_and_goes_on_from_before_the_corruption(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"steps": 40, "verify_every": 10}
    config = tiny_config("run", training=training, distribution={"num_replicas": 3}, checkpoint={"every_steps": 4})
    expected = causal_lm.train(tiny_config("clean", training=training, distribution={"num_replicas": 3}))
    call = TrainStep.__call__

    def corrupted(self: TrainStep, batches: object, first_step: int, num_steps: int) -> object:
        if first_step == 23:
            corrupt(self._optimizer.weights[2], 1, 0, 20)
        return call(self, batches, first_step, num_steps)

    monkeypatch.setattr(TrainStep, "__call__", corrupted)
    with pytest.raises(TrainingError) as caught:
        causal_lm.train(config)
    message = str(caught.value)
    assert message.startswith("step 24: the replicas no longer hold the same values, first in ")  # before it is saved
    assert ": replica 1 disagrees with the others; they agreed after step 20; the last good checkpoint is " in message
    assert "step_00000020" in message
    monkeypatch.undo()
    found = causal_lm.train(replace(config, checkpoint=replace(config.checkpoint, keep=100)))
    assert found["state_sha256"] == expected["state_sha256"]
    rows = [json.loads(line) for line in Path(str(config.run_dir), "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 41))


CORRUPTED_WORKER = """
import os, runpy, sys
from tfdp.system.startup import load_tensorflow
load_tensorflow()
import numpy as np
import tensorflow as tf
from tfdp.training.step import TrainStep
call = TrainStep.__call__
def corrupted(self, batches, first_step, num_steps):
    if first_step == 13 and '"index": 1' in os.environ["TF_CONFIG"]:
        copy = self._strategy.experimental_local_results(self._optimizer.weights[2].value)[0]
        values = copy.numpy().copy()
        values.reshape(-1).view(np.uint32)[0] ^= np.uint32(1 << 20)
        tf.raw_ops.AssignVariableOp(resource=copy.handle, value=values)
    return call(self, batches, first_step, num_steps)
TrainStep.__call__ = corrupted
sys.argv[0] = "tfdp.train"
runpy.run_module("tfdp.train", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.timeout(400)
def test_all_workers_name_the_replica_and_go_on_together(tmp_path: Path, corpus_dir: Path) -> None:
    """Two workers of two replicas; the first replica of worker 1, number 2 of all, is corrupted after step 13."""
    changes = {"training__steps": 30, "training__verify_every": 10, "checkpoint__every_steps": 8}
    changes["distribution__num_replicas"] = 2
    arguments = tiny_arguments(corpus_dir, tmp_path / "run", **changes)
    with start(tmp_path, [arguments] * 2, [sys.executable, "-u", "-c", CORRUPTED_WORKER]) as job:
        assert job.wait() == [1, 1], [job.output(index) for index in range(2)]
        for index in range(2):
            last = job.output(index).splitlines()[-1]
            assert last.startswith("error: step 16: the replicas no longer hold the same values, first in ")
            assert "replica 2 on worker 1 (127.0.0.1:" in last
            assert "disagrees with the others; they agreed after step 10" in last
            assert "step_00000008" in last
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000008"]
    for name in ("run", "clean"):
        with start(tmp_path, [tiny_arguments(corpus_dir, tmp_path / name, **changes)] * 2) as job:
            assert job.wait() == [0, 0], job.output(0)
    found, expected = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "clean"))
    assert found["state_sha256"] == expected["state_sha256"]

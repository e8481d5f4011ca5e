"""The average of the weights: its numbers, who reads it, what it survives, and that training does not see it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdp
from tfdp import assembly
from tfdp.config.sections import (
    CheckpointConfig,
    DataConfig,
    DistributionConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from tfdp.data import sources
from tfdp.inference.trained import TrainedModel
from tfdp.interop.origin import RunModel
from tfdp.models.gpt import GPT
from tfdp.models.lora import is_adapter
from tfdp.optim.average import WeightAverage
from tfdp.optim.optimizer import Optimizer
from tfdp.optim.schedule import make_schedule
from tfdp.parallel import distribution
from tfdp.parallel.batch_layout import BatchLayout
from tfdp.parallel.consistency import Disagreement
from tfdp.recipe import FUNCTIONS
from tfdp.system.exits import ConfigError
from tfdp.tasks.causal_lm import next_token_loss
from tfdp.training.averaging import Averaging
from tfdp.training.checkpoint import CheckpointFolder, DamagedCheckpoint
from tfdp.training.evaluation import Evaluator
from tfdp.training.step import StepRules, TrainStep
from trainers import causal_lm
from trainers.causal_lm import Config

DECAY = 0.5  # reached after 8 steps
STEPS = 12


def checkpoints(config: Config) -> CheckpointFolder:
    return CheckpointFolder(Path(str(config.run_dir), "checkpoints"))


def configured(corpus_dir: Path, run_dir: Path, **training: object) -> Config:
    keys: dict[str, Any] = {"log_every": 1, "evaluate_every": 5, "sample_tokens": 0, "jit_compile": False, **training}
    return Config(
        run_dir=str(run_dir),
        seed=3,
        model=ModelConfig(num_layers=1, num_heads=2, model_dim=16, context_length=16),
        data=DataConfig(source=f"text:{corpus_dir}/*.txt", validation_fraction=0.2),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2, warmup_steps=5, schedule="constant"),
        training=TrainingConfig(**{"steps": STEPS, "global_batch_size": 12, "on_spike": "rollback", **keys}),
        checkpoint=CheckpointConfig(every_steps=1, keep=100),  # and one of step 0, to roll back to
    )


Trained = tuple[Config, dict[str, Any]]  # with its summary


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> Trained:
    config = configured(corpus_dir, tmp_path_factory.mktemp("average") / "averaged", ema_decay=DECAY)
    return config, causal_lm.train(config)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> Trained:
    config = configured(corpus_dir, tmp_path_factory.mktemp("average") / "plain")
    return config, causal_lm.train(config)


def of_default(config: Config, **training: object) -> Config:
    """The same with Muon and under XLA, as a run without flags."""
    optimizer = replace(config.optimizer, name="muon")
    return replace(config, optimizer=optimizer, training=replace(config.training, jit_compile="auto", **training))


def assert_average(folder: CheckpointFolder) -> None:
    """The averages in the checkpoints of all steps are those that numpy makes of the weights in them."""
    assert folder.steps() == list(range(STEPS + 1))
    expected = folder.load(0).weights
    for step in range(STEPS + 1):
        found = folder.load(step)
        assert found.average.keys() == found.weights.keys() != set()
        if step:
            decay = min(DECAY, (1 + step) / (10 + step))
            expected = {name: decay * old + (1 - decay) * found.weights[name] for name, old in expected.items()}
        for name, average in found.average.items():
            assert average.dtype == np.float32
            np.testing.assert_allclose(average, expected[name], rtol=1e-5, atol=1e-7, err_msg=f"{name} {step}")
    assert any(np.abs(found.average[name] - found.weights[name]).max() > 1e-3 for name in found.weights)


def test_it_is_the_average_of_the_weights_after_each_step(averaged: Trained) -> None:
    assert_average(checkpoints(averaged[0]))


def test_training_does_not_see_it(averaged: Trained, plain: Trained) -> None:
    for key in ("weights_sha256", "train_loss"):
        assert plain[1][key] == averaged[1][key]
    for key in ("state_sha256", "validation_loss"):
        assert plain[1][key] != averaged[1][key]
    assert not checkpoints(plain[0]).load(STEPS).average


@pytest.mark.slow
def test_training_does_not_see_it_by_default(corpus_dir: Path, tmp_path: Path) -> None:
    found, configs = {}, {}
    for decay in (None, DECAY, 0.0):
        configs[decay] = of_default(configured(corpus_dir, tmp_path / f"{decay}"), ema_decay=decay)
        found[decay] = causal_lm.train(configs[decay])
    assert len({summary["weights_sha256"] for summary in found.values()}) == 1
    assert len({summary["state_sha256"] for summary in found.values()}) == 3
    assert found[0.0]["validation_loss"] == found[None]["validation_loss"] != found[DECAY]["validation_loss"]
    assert_average(checkpoints(configs[DECAY]))


def test_who_reads_the_run_reads_the_average(averaged: Trained) -> None:
    config, summary = averaged
    best = checkpoints(config).load(checkpoints(config).best_step() or 0)
    trained = TrainedModel.open(str(config.run_dir), "newest", "evaluated", FUNCTIONS)
    newest = checkpoints(config).load(STEPS)
    assert all(np.array_equal(trained.weights[name], newest.average[name]) for name in newest.weights)
    corpus = sources.open_corpus(trained.config.data, sources.cache_dir(trained.config.data))
    strategy = distribution.make_strategy(trained.config.distribution)
    with strategy.scope():
        model = trained.make_model()
    rows = trained.config.training.rows_of_evaluation
    evaluator = assembly.make_evaluator(
        trained.recipe, trained.config, corpus, strategy, model, trained.compilation, rows
    )
    assert evaluator().recorded()["loss"] == summary["validation_loss"]
    run = RunModel.open(Path(str(config.run_dir)))
    assert run.files[0].name == "average.safetensors"
    read = run.weights(config.model, corpus.tokenizer.vocab_size)
    assert all(np.array_equal(read[name], best.average[name]) for name in best.weights)
    assert tfdp.load(str(config.run_dir)).generate("alpha", num_tokens=4, temperature=0)


@pytest.mark.slow
@pytest.mark.parametrize("is_default", [False, True], ids=["adamw", "default"])
def test_it_is_resumed_to_the_bit_in_another_layout(corpus_dir: Path, tmp_path: Path, is_default: bool) -> None:
    def run(name: str, steps: int, num_replicas: int) -> dict[str, Any]:
        config = configured(corpus_dir, tmp_path / name, steps=steps, microbatch_size=3, ema_decay=DECAY)
        layout = replace(config.distribution, reduction="canonical", num_replicas=num_replicas)
        config = replace(of_default(config) if is_default else config, distribution=layout)
        return causal_lm.train(config)

    whole = run("whole", STEPS, 1)
    run("halves", 5, 1)
    summary = run("halves", STEPS, 4)
    for key in ("weights_sha256", "state_sha256", "validation_loss", "train_loss"):
        assert summary[key] == whole[key], key


def test_an_average_begins_and_ends_at_a_resume(averaged: Trained, plain: Trained, tmp_path: Path) -> None:
    """A checkpoint that has none is given one, and one that has is left without, by the key alone."""
    for name, (begun, _), decay in (("begins", plain, DECAY), ("ends", averaged, None)):
        run_dir = tmp_path / name
        shutil.copytree(str(begun.run_dir), run_dir)
        training = replace(begun.training, steps=STEPS + 1, ema_decay=decay)
        causal_lm.train(replace(begun, run_dir=str(run_dir), training=training))
        before, after = (CheckpointFolder(run_dir / "checkpoints").load(step) for step in (STEPS, STEPS + 1))
        assert bool(before.average) == (decay is None) and bool(after.average) == (decay is not None)
        for key, average in after.average.items():
            expected = DECAY * before.weights[key] + (1 - DECAY) * after.weights[key]
            np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)


def test_an_evaluation_that_fails_leaves_no_checkpoint_with_exchanged_weights(
    averaged: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, seen = Evaluator.__call__, []

    def failing(self: Evaluator) -> object:
        seen.append(1)
        if len(seen) == 2:
            raise RuntimeError("no memory")
        return call(self)

    config = replace(averaged[0], run_dir=str(tmp_path / "failing"))
    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "__call__", failing)
        with pytest.raises(RuntimeError, match="no memory"):
            causal_lm.train(config)
    assert checkpoints(config).steps() == list(range(10))
    for step in range(10):
        found, expected = (checkpoints(each).load(step) for each in (config, averaged[0]))
        assert all(np.array_equal(found.weights[name], expected.weights[name]) for name in expected.weights)
        assert all(np.array_equal(found.average[name], expected.average[name]) for name in expected.weights)
    assert causal_lm.train(config)["state_sha256"] == averaged[1]["state_sha256"]


def test_a_damaged_average_is_found(averaged: Trained, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    shutil.copytree(checkpoints(averaged[0]).path(3), folder.path(3))
    average = folder.path(3) / "average.safetensors"
    average.write_bytes(average.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(DamagedCheckpoint, match=r"average\.safetensors is damaged"):
        folder.load(3)
    average.unlink()
    with pytest.raises(DamagedCheckpoint, match=r"is incomplete: average\.safetensors: No such file"):
        folder.load(3)


def test_adapters_start_from_the_average_and_have_one_of_their_own(averaged: Trained, tmp_path: Path) -> None:
    base = checkpoints(averaged[0]).load(checkpoints(averaged[0]).best_step() or 0)
    adapted = tfdp.train(
        run_dir=str(tmp_path / "adapted"),
        model={"init_from": str(averaged[0].run_dir), "lora_rank": 2},
        data={"source": averaged[0].data.source, "validation_fraction": 0.2},
        training={"steps": 3, "global_batch_size": 12, "sample_tokens": 2, "ema_decay": DECAY, "jit_compile": False},
    )
    found = CheckpointFolder(tmp_path / "adapted" / "checkpoints").load(adapted["step"])
    assert found.average.keys() == found.weights.keys() and all(map(is_adapter, found.average))
    assert any(np.any(found.average[name] != found.weights[name]) for name in found.weights)
    for name, weight in base.average.items():
        np.testing.assert_array_equal(found.frozen[name], weight)


# --- One step --------------------------------------------------------------------------------------


class Steps:
    """A train step of three replicas with an average, whose loss is not finite at step 2."""

    def __init__(self) -> None:
        self.strategy = distribution.make_strategy(DistributionConfig(num_replicas=3))
        config = OptimizerConfig(name="adamw", learning_rate=1e-2, schedule="constant")
        with self.strategy.scope():
            model = GPT(ModelConfig(num_layers=1, num_heads=2, model_dim=16, context_length=8), 32)
            self.optimizer = Optimizer(config, model.trainable_variables)
            self.average = WeightAverage(DECAY, self.optimizer.weights)
        loss = next_token_loss(model)

        def broken(rows: Any, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            losses, counts = loss(rows, step)
            return losses * tf.where(step == 2, np.float32(np.nan), np.float32(1.0)), counts

        self.run = TrainStep(
            self.strategy,
            broken,
            self.optimizer,
            make_schedule(config, 100),
            BatchLayout(6, 2),
            StepRules(verify_every=100, skip_spikes=True),
            False,
            average=self.average,
        )
        tokens = np.random.default_rng(0).integers(0, 32, (6, 9)).astype(np.int32)
        batch = {"tokens": tf.constant(tokens), "position": tf.range(6, dtype=tf.int64)}
        dataset = tf.data.Dataset.from_tensors(batch).repeat().unbatch().batch(6, True)
        self.batches = iter(self.strategy.experimental_distribute_dataset(dataset))

    def values(self) -> list[np.ndarray]:
        return [average.numpy() for average in self.average.variables]


@pytest.fixture(scope="module")
def steps() -> Steps:
    return Steps()


def test_a_skipped_step_leaves_it_as_it_is(steps: Steps) -> None:
    assert not steps.run(steps.batches, 0, 2).skipped
    before = steps.values()
    assert [spike.step for spike in steps.run(steps.batches, 2, 1).skipped] == [3]
    assert all(map(np.array_equal, steps.values(), before))
    steps.run(steps.batches, 3, 1)
    assert not all(map(np.array_equal, steps.values(), before))


def test_the_exchange_is_undone_also_by_an_error_and_hides_no_disagreement(steps: Steps) -> None:
    averaging = Averaging(steps.strategy, steps.optimizer.weights, steps.average.variables)
    for variable in (steps.average.variables[3], steps.optimizer.weights[2]):
        copy, good = variable.value.values[1], variable.numpy()
        copy.assign(good + np.float32(1.0))
        weights, averages = [weight.numpy() for weight in steps.optimizer.weights], steps.values()
        with pytest.raises(RuntimeError, match="no memory"), averaging():
            assert averaging.is_on
            assert all(map(np.array_equal, steps.values(), weights))
            assert all(map(np.array_equal, [weight.numpy() for weight in steps.optimizer.weights], averages))
            raise RuntimeError("no memory")
        assert not averaging.is_on
        assert all(map(np.array_equal, steps.values(), averages))
        assert steps.run.verify(5) == Disagreement(variable.path, (1,), True)
        copy.assign(good)
        assert steps.run.verify(5) is None


def test_weights_of_another_type_are_refused() -> None:
    weights = [keras.Variable(np.zeros(2), dtype=dtype, name=dtype) for dtype in ("float32", "float16")]
    rule = (
        r"^training\.ema_decay \(0\.9\) needs a model whose weights are float32, but float16 is float16: leave it out$"
    )
    with pytest.raises(ConfigError, match=rule):
        WeightAverage(0.9, weights)

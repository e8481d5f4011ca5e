"""Keras models of a user's, KerasHub's among them, as recipes: one run in any layout, resumed, refused by name."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import kill_a_worker

ROOT = Path(__file__).parents[1]
BUILDERS = '''
import keras
from keras import layers, ops

NUM_LAYERS = 2

def gpt2(vocab_size):
    from keras_nlp.models import GPT2Backbone
    return GPT2Backbone(vocabulary_size=vocab_size, num_layers=2, num_heads=2, hidden_dim=16, intermediate_dim=32,
                        dropout=0.1, max_sequence_length=32)

def llama3(vocab_size):
    from keras_nlp.models import Llama3Backbone
    return Llama3Backbone(vocabulary_size=vocab_size, num_layers=2, num_query_heads=2, num_key_value_heads=1,
                          hidden_dim=16, intermediate_dim=32)

class Mean(layers.Layer):
    """The mean of what is before."""
    def call(self, x):
        return ops.cumsum(x, axis=1) / ops.cast(ops.arange(1, x.shape[1] + 1), x.dtype)[None, :, None]

class Own(keras.Model):
    def __init__(self, vocab_size, width):
        super().__init__()
        self.embed = layers.Embedding(vocab_size, width)
        self.mean, self.dropout = Mean(), layers.Dropout(0.2)
        self.hidden, self.project = layers.Dense(width, activation="relu"), layers.Dense(vocab_size)
    def call(self, ids, training=False):
        x = self.embed(ids)
        x = self.dropout(self.hidden(ops.concatenate([x, self.mean(x)], axis=-1)), training=training)
        return self.project(x)

def own(vocab_size, width=16):
    return Own(vocab_size, width)

def functional(vocab_size, *extra):
    ids = keras.Input((None,), dtype="int32")
    x = layers.Embedding(vocab_size, 8)(ids)
    for layer in extra:
        x = layer(x)
    return keras.Model(ids, layers.Dense(vocab_size, name="logits")(x))

def future(vocab_size):
    return functional(vocab_size, layers.Lambda(lambda x: x + ops.mean(x, axis=1, keepdims=True)))

def attending(vocab_size):
    ids = keras.Input((None,), dtype="int32")
    x = layers.Embedding(vocab_size, 8)(ids)
    x = layers.MultiHeadAttention(2, 4, dropout=0.3)(x, x, use_causal_mask=True)
    return keras.Model(ids, layers.Dense(vocab_size)(layers.Dropout(0.3)(x)))

def fixed(vocab_size):
    ids = keras.Input((16,), dtype="int32")
    return keras.Model(ids, layers.Dense(vocab_size)(layers.Embedding(vocab_size, 8)(ids)))

class Flat(layers.Layer):
    def __init__(self):
        super().__init__()
        self.dropout = layers.Dropout(0.5, name="of_flat")
    def call(self, x, training=False):
        return x + self.dropout(ops.ones_like(x[:1]), training=training)

def flat(vocab_size):
    return functional(vocab_size, Flat())

class Twice(layers.Layer):
    def __init__(self):
        super().__init__()
        self.dropout = layers.Dropout(0.5)
    def call(self, x, training=False):
        ones = ops.ones_like(x)
        return self.dropout(ones, training=training) - self.dropout(ones, training=training)

def twice(vocab_size):
    ids = keras.Input((None,), dtype="int32")
    return keras.Model(ids, Twice()(layers.Embedding(vocab_size, vocab_size)(ids)))

def future_behind_zeros(vocab_size):
    return functional(vocab_size, layers.Lambda(lambda x: x + ops.mean(x, axis=1, keepdims=True)),
                      layers.Dense(8, kernel_initializer="zeros", use_bias=False))

class Wild(layers.Layer):
    def call(self, x, training=False):
        import tensorflow as tf
        return x + tf.random.normal(tf.shape(x)) if training else x

def wild(vocab_size):
    return functional(vocab_size, Wild())

class Global(layers.Layer):
    def call(self, x, training=False):
        return x + keras.random.normal(ops.shape(x)) if training else x

def global_noise(vocab_size):
    return functional(vocab_size, Global())

class Penalty(layers.Layer):
    def call(self, x, training=False):
        if training:
            self.add_loss(ops.mean(x))
        return x

def penalised(vocab_size):
    return functional(vocab_size, Penalty())

class Late(keras.Model):
    def build(self, shape):
        self.embed, self.project = layers.Embedding(self.size, 8), layers.Dense(self.size)
        self.drop = layers.Dropout(0.2)
    def call(self, ids, training=False):
        return self.project(self.drop(self.embed(ids), training=training))

def late(vocab_size):
    model = Late()
    model.size = vocab_size
    return model

def noisy(vocab_size):
    return functional(vocab_size, layers.GaussianNoise(0.1))

def normal(vocab_size):
    return functional(vocab_size, layers.BatchNormalization(name="batch_norm"))

def regular(vocab_size):
    return functional(vocab_size, layers.Dense(8, kernel_regularizer="l2"))

def narrow(vocab_size):
    return functional(vocab_size - 1)

def broken(vocab_size):
    raise KeyError("depth")
'''
KEYS = ["--trainer=keras_model", "--model.context_length=16", "--training.global_batch_size=8"]
KEYS += ["--training.sample_tokens=0", "--data.validation_fraction=0.2", "--training.evaluate_every=0"]
KEYS += ["--training.log_every=1", "--optimizer.schedule=constant"]
FULL = [pytest.mark.slow, pytest.mark.full]
MODELS = ("own", pytest.param("gpt2", marks=FULL), pytest.param("llama3", marks=FULL))

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keras")
    (folder / "builders.py").write_text(BUILDERS)
    return folder


def start(folder: Path, command: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    line = [sys.executable, "-m", f"tfdp.{command}", *map(str, arguments)]
    return subprocess.Popen(
        line,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def tfdp(folder: Path, command: str, *arguments: object) -> tuple[int, str, str]:
    process = start(folder, command, *arguments)
    try:
        out, error = process.communicate(timeout=250)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, error


def losses(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def summary(folder: Path, name: str) -> dict[str, float]:
    return json.loads((folder / name / "summary.json").read_text())


def train(folder: Path, name: str, model: str, corpus: Path, steps: int, *own: str, workers: int = 1) -> None:
    keys = [*KEYS, f"--data.source=text:{corpus}/*.txt", f"--model.builder=builders:{model}", f"--run_dir={name}"]
    command = ("launch", f"--num_workers={workers}", "--max_restarts=2", "--") if workers > 1 else ("train",)
    code, _, error = tfdp(folder, *command, *keys, f"--training.steps={steps}", *own)
    assert code == 0, error


@pytest.mark.slow
def test_a_model_of_ones_own_is_trained_read_back_and_resumed(folder: Path, corpus_dir: Path) -> None:
    """Two replicas have the losses of one, dropout included; half a run and its other half have the bits of a whole."""
    train(folder, "one", "own", corpus_dir, 12)
    train(folder, "two", "own", corpus_dir, 12, "--distribution.num_replicas=2")
    np.testing.assert_allclose(losses(folder, "two"), losses(folder, "one"), rtol=1e-5)
    assert losses(folder, "one")[-1] < losses(folder, "one")[0] - 0.2
    train(folder, "half", "own", corpus_dir, 6)
    code, _, error = tfdp(folder, "train", "--run_dir=half", "--training.steps=12")
    assert code == 0, error
    assert summary(folder, "half")["state_sha256"] == summary(folder, "one")["state_sha256"]
    code, out, error = tfdp(folder, "evaluate", "--run_dir=one", "--checkpoint=newest")
    assert code == 0, error
    assert json.loads(out)["validation_loss"] == pytest.approx(summary(folder, "one")["validation_loss"], rel=1e-6)
    code, out, error = tfdp(folder, "generate", "--run_dir=one", "--prompt=alpha", "--num_tokens=8", "--temperature=0")
    assert code == 0 and out.startswith("alpha") and len(out) > 6, error
    code, _, error = tfdp(folder, "train", "--model.init_from=one")
    assert code == 2 and "model.init_from (one) must be the run of a GPT, but has the key model." in error


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_has_the_losses_of_one_replica(folder: Path, corpus_dir: Path, model: str) -> None:
    """At a rate at which rounding does not grow: at the default one, in 30 steps of Llama, 1e-8 becomes 8e-5."""
    rates = ["--optimizer.learning_rate=0.003", "--optimizer.adam_learning_rate=0.003"]
    layouts = {"2": ["--distribution.num_replicas=2"], "4": ["--distribution.num_replicas=4"]}
    train(folder, f"{model}_1", model, corpus_dir, 30, *rates)
    for name, own in layouts.items():
        train(folder, f"{model}_{name}", model, corpus_dir, 30, *own, *rates)
    train(folder, f"{model}_w", model, corpus_dir, 30, *rates, workers=2)
    for other in (*layouts, "w"):
        np.testing.assert_allclose(losses(folder, f"{model}_{other}"), losses(folder, f"{model}_1"), rtol=1e-5)
    train(folder, f"{model}_half", model, corpus_dir, 15, *rates)
    code, _, error = tfdp(folder, "train", f"--run_dir={model}_half", "--training.steps=30")
    assert code == 0, error
    assert summary(folder, f"{model}_half")["state_sha256"] == summary(folder, f"{model}_1")["state_sha256"]


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.parametrize("model", MODELS)
def test_in_canonical_order_every_layout_has_the_same_bits(folder: Path, corpus_dir: Path, model: str) -> None:
    """At the default rates."""
    keys = ["--distribution.reduction=canonical", "--training.microbatch_size=2"]
    train(folder, f"{model}_c1", model, corpus_dir, 30, *keys)
    train(folder, f"{model}_c4", model, corpus_dir, 30, *keys, "--distribution.num_replicas=4")
    train(folder, f"{model}_cw", model, corpus_dir, 30, *keys, workers=2)
    assert len({summary(folder, f"{model}_c{each}")["state_sha256"] for each in ("1", "4", "w")}) == 1


@pytest.mark.slow
@pytest.mark.multiworker
def test_a_killed_worker_is_restarted_and_nothing_shows(folder: Path, corpus_dir: Path) -> None:
    keys = ["--distribution.reduction=canonical", "--training.microbatch_size=2", "--checkpoint.every_steps=20"]
    train(folder, "calm", "gpt2", corpus_dir, 400, *keys, workers=2)
    arguments = [*KEYS, f"--data.source=text:{corpus_dir}/*.txt", "--model.builder=builders:gpt2", "--run_dir=killed"]
    process = start(
        folder, "launch", "--num_workers=2", "--max_restarts=3", "--", *arguments, *keys, "--training.steps=400"
    )
    assert "restart" in kill_a_worker(process, folder / "killed")
    assert summary(folder, "killed")["state_sha256"] == summary(folder, "calm")["state_sha256"]


def test_masks_belong_to_sequences_and_not_to_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those inside a MultiHeadAttention too."""
    import tensorflow as tf

    from tfdp.config.sections import KerasModelConfig
    from tfdp.models.wrapped import WrappedModel, build

    monkeypatch.syspath_prepend(str(folder))
    config = KerasModelConfig(builder="builders:attending", context_length=16)
    model = WrappedModel(build(config, 64, 0, "float32"), config, 64)
    tokens = tf.constant([[*range(16)]] * 3)
    first, second, third = model.features(tokens, tf.constant([7, 8, 7], tf.uint32)).numpy()
    np.testing.assert_allclose(first, third, atol=1e-5)
    assert np.abs(first - second).max() > 1e-3
    moved = model.features(tokens, tf.constant([8, 9, 7], tf.uint32)).numpy()
    np.testing.assert_allclose(moved[0], second, atol=1e-6)
    np.testing.assert_array_equal(*model.features(tokens).numpy()[:2])


def test_layers_made_in_build_have_names_masks_and_a_precision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tfdp.config.sections import KerasModelConfig
    from tfdp.models.wrapped import WrappedModel, build

    monkeypatch.syspath_prepend(str(folder))
    config = KerasModelConfig(builder="builders:late", context_length=16)
    drawn = np.random.get_state()[1].tolist()
    models = [WrappedModel(build(config, 64, 0, "bfloat16"), config, 64) for _ in range(2)]
    assert np.random.get_state()[1].tolist() == drawn  # the caller's own numbers go on
    assert [*models[0].named_weights()] == [*models[1].named_weights()]
    assert models[0].features(np.ones((1, 16), np.int32)).dtype == "bfloat16"


def test_a_layer_that_is_used_twice_draws_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    from tfdp.config.sections import KerasModelConfig
    from tfdp.models.wrapped import WrappedModel, build

    monkeypatch.syspath_prepend(str(folder))
    config = KerasModelConfig(builder="builders:twice", context_length=16)
    model = WrappedModel(build(config, 64, 0, "float32"), config, 64)
    found = [model.features(tf.ones([2, 16], tf.int32), tf.constant([3, 4], tf.uint32)).numpy() for _ in range(2)]
    np.testing.assert_array_equal(*found)
    assert 0.4 < (found[0] != 0).mean() < 0.6  # two masks of one half each, one of them inverted


def test_a_model_of_one_length_takes_shorter_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tfdp.config.sections import KerasModelConfig
    from tfdp.inference.scoring import Scorer
    from tfdp.models.wrapped import WrappedModel, build

    monkeypatch.syspath_prepend(str(folder))
    config = KerasModelConfig(builder="builders:fixed", context_length=16)
    scorer = Scorer(WrappedModel(build(config, 64, 0, "float32"), config, 64), 64)
    short, long = scorer.logits(np.array([[1, 2, 3]])), scorer.logits(np.array([[1, 2, 3, *range(4, 17)]]))
    assert short.shape == (1, 3, 64)
    np.testing.assert_allclose(short, long[:, :3], atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["--model.builder=builders"], "model.builder (builders) must be MODULE:FUNCTION"),
        (
            ["--model.builder=os:system"],
            "model.builder (os:system) must not be a function of Python's standard library",
        ),
        (["--model.builder=builders:missing"], "must name MODULE:FUNCTION: AttributeError"),
        (["--model.builder=nowhere:build"], "must name MODULE:FUNCTION: ModuleNotFoundError"),
        ([], "model.builder () must be given: try my_package.my_module:build"),
        (["--model.builder=builders:own", "--model.arguments=[1]"], "model.arguments ([1]) must be an object in JSON"),
        (["--model.builder=builders:own", "--training.loss_chunk_size=8"], "training.loss_chunk_size (8) must be null"),
        (["--model.builder=builders:own", "--data.document_attention=true"], "data.document_attention (True) must be"),
    ],
)
def test_a_mistake_in_keys_is_one_line(folder: Path, corpus_dir: Path, keys: list[str], message: str) -> None:
    code, _, error = tfdp(folder, "train", *KEYS, f"--data.source=text:{corpus_dir}/*.txt", "--run_dir=no", *keys)
    assert code == 2 and message in error and len(error.splitlines()) == 1, error


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        ("future", "must make a causal model: a token moves the logits of those before it"),
        ("future_behind_zeros", "must make a causal model: a token moves the logits of those before it"),
        ("wild", "draws random numbers of its own: try keras.layers.Dropout"),
        ("global_noise", "state that each step would change: one outside of its layers, such as the global generator"),
        ("penalised", "with losses of its own, which no step adds: try optimizer.weight_decay"),
        ("noisy", "state that each step would change: seed_generator_state of gaussian_noise (GaussianNoise)"),
        ("normal", "state that each step would change: moving_mean of batch_norm (BatchNormalization)"),
        ("regular", "with losses of its own, which no step adds: try optimizer.weight_decay"),
        ("narrow", "must make a model that gives logits of shape (batch, time, 256) or wider, not [2, 16, 255]"),
        ("flat", "the layer of_flat (Dropout) must drop parts of sequences, the first axis of its input, but that is"),
        ("broken", "cannot build a model: KeyError: 'depth'"),
    ],
)
def test_a_model_that_no_step_can_train_is_refused_by_name(
    builder: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tfdp.config.sections import KerasModelConfig
    from tfdp.models.wrapped import WrappedModel, build
    from tfdp.system.exits import CommandError

    monkeypatch.syspath_prepend(str(folder))
    config = KerasModelConfig(builder=f"builders:{builder}", context_length=16)
    with pytest.raises(CommandError) as caught:
        WrappedModel(build(config, 256, 0, "float32"), config, 256)
    assert message in str(caught.value)

"""A GPT as a SavedModel, run by a process that has neither tfdp nor Keras: the same numbers."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import ModelConfig, SamplingConfig
from tfdp.data.tokenizers.tokenizer import ByteTokenizer
from tfdp.inference.sampling import Sampler
from tfdp.interop.saved_model import write_saved_model
from tfdp.models.gpt import GPT

SMALL = {"num_layers": 2, "num_heads": 4, "model_dim": 32, "context_length": 24, "zero_init": False, "init_stddev": 0.3}
MODELS = {
    "default": ModelConfig(**SMALL),
    "gpt2": ModelConfig(
        **SMALL,
        position="learned",
        norm="layer_norm",
        activation="gelu",
        use_bias=True,
        tie_embeddings=True,
        qk_norm=False,
    ),
    "window": ModelConfig(**SMALL, num_kv_heads=2, sliding_window=5, layers_without_rope=(1,), qk_norm_gain=True),
}
NUM_TOKENS = 12

# Runs elsewhere, with what TensorFlow alone brings along.
CLIENT = """
import sys

sys.modules["tfdp"] = sys.modules["keras"] = sys.modules["keras_hub"] = None  # to import one is an ImportError

import numpy as np
import tensorflow as tf

loaded = tf.saved_model.load("saved")
given = np.load("given.npz")
tokens, prompt = tf.constant(given["tokens"]), tf.constant(given["prompt"])


def generate(tokens, num_tokens, temperature, seed):
    numbers = {"num_tokens": num_tokens, "temperature": temperature, "seed": seed}
    numbers = {name: tf.constant(number) for name, number in numbers.items()}
    return loaded.signatures["generate"](tokens=tokens, **numbers)["tokens"].numpy()


found = {
    "logits": loaded.signatures["logits"](tokens=tokens)["logits"].numpy(),
    "one": loaded.signatures["logits"](tokens=tokens[:, :1])["logits"].numpy(),
    "score": loaded.signatures["score"](tokens=tokens)["log_probabilities"].numpy(),
    "greedy": generate(prompt, int(given["num_tokens"]), 0.0, 0),
    "seed 1": generate(tf.repeat(prompt, 64, axis=0), 4, 1.0, 1),
    "seed 1 again": generate(tf.repeat(prompt, 64, axis=0), 4, 1.0, 1),
    "seed 2": generate(tf.repeat(prompt, 64, axis=0), 4, 1.0, 2),
}
np.savez("found.npz", **found)
for wrong in ((20, 0.0), (0, 0.0), (2, -1.0)):
    try:
        generate(prompt, *wrong, 0)
    except tf.errors.InvalidArgumentError as error:
        print(*str(error).split())
print(sorted(name for name, module in sys.modules.items() if module and name.startswith(("tfdp", "keras"))))
"""


def make_model(name: str) -> GPT:
    model = GPT(MODELS[name], 256, seed=1)
    numbers = np.random.default_rng(0)
    for variable in model.named_weights().values():  # gains and biases are no constants then
        if len(variable.shape) == 1:
            variable.assign(numbers.normal(0.5, 0.2, variable.shape))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_process_without_tfdp_computes_and_generates_the_same(name: str, tmp_path: Path) -> None:
    model, tokenizer = make_model(name), ByteTokenizer()
    write_saved_model(tmp_path / "saved", model, tokenizer.end_of_text)
    tokens = np.random.default_rng(0).integers(0, 256, (3, 20)).astype(np.int32)
    prompt = np.array([[tokenizer.end_of_text, *b"alpha"]], np.int32)
    np.savez(tmp_path / "given.npz", tokens=tokens, prompt=prompt, num_tokens=NUM_TOKENS)
    (tmp_path / "client.py").write_text(CLIENT)
    line = [sys.executable, "-I", str(tmp_path / "client.py")]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *refusals, modules = done.stdout.splitlines()
    assert modules == "[]"
    for refusal, rule in zip(refusals, ("context length, 24", "num_tokens", "temperature"), strict=True):
        assert rule in refusal

    found = np.load(tmp_path / "found.npz")
    logits = model(tokens).numpy()
    np.testing.assert_allclose(found["logits"], logits, atol=1e-5)
    np.testing.assert_allclose(found["one"], logits[:, :1], atol=1e-5)
    scores = tf.gather(tf.nn.log_softmax(logits[:, :-1]), tokens[:, 1:], batch_dims=2)
    np.testing.assert_allclose(found["score"], scores, atol=1e-5)

    config = SamplingConfig(num_tokens=NUM_TOKENS, temperature=0)
    greedy = list(Sampler(model, tokenizer).tokens("alpha", config))
    assert found["greedy"].tolist() == [greedy + [tokenizer.end_of_text] * (NUM_TOKENS - len(greedy))]
    assert np.array_equal(found["seed 1"], found["seed 1 again"])
    assert not np.array_equal(found["seed 1"], found["seed 2"])
    assert len(np.unique(found["seed 1"], axis=0)) > 1  # rows draw on their own


def test_a_row_that_met_the_end_of_text_stays_there_and_the_others_go_on(tmp_path: Path) -> None:
    model = make_model("default")
    tokens = np.random.default_rng(0).integers(0, 256, (4, 5)).astype(np.int32)
    write_saved_model(tmp_path / "any", model, end_of_text=-1)
    loaded = tf.saved_model.load(str(tmp_path / "any"))
    everything = loaded.generate(tokens, 10, 0.0, 0)["tokens"].numpy()
    end = int(everything[2, 3])
    write_saved_model(tmp_path / "ends", model, end)
    loaded = tf.saved_model.load(str(tmp_path / "ends"))
    ended = loaded.generate(tokens, 10, 0.0, 0)["tokens"].numpy()
    after = np.cumsum(everything == end, axis=1) > 0
    assert after.any() and not after.all()
    assert np.array_equal(ended, np.where(after, end, everything))


def test_the_weights_are_stored_once(tmp_path: Path) -> None:
    model = make_model("default")
    write_saved_model(tmp_path / "saved", model, 255)
    stored = sum(path.stat().st_size for path in (tmp_path / "saved" / "variables").iterdir())
    assert stored < 4 * model.num_params() + 10_000

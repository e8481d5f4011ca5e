"""Models of transformers, with small random weights, read as a GPT and written back: the same numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import ModelConfig
from tfdp.interop.hugging_face import HuggingFaceModel, write_model
from tfdp.interop.tensor_folder import TensorFolder
from tfdp.models.gpt import GPT
from tfdp.ops.cross_entropy import projected_cross_entropy

torch = pytest.importorskip("torch", reason="needs pip install 'tfdp[peers]'")
transformers = pytest.importorskip("transformers", reason="needs pip install 'tfdp[peers]'")

pytestmark = pytest.mark.peers

VOCABULARY, LENGTH = 96, 48
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "gpt2, untied, wide": (
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "n_inner": 40,
            "tie_word_embeddings": False,
            "layer_norm_epsilon": 1e-3,
        },
    ),
    "llama": ("Llama", {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama3": ("Llama", {**SMALL, "rope_parameters": LLAMA3, "head_dim": 16, "rms_norm_eps": 1e-3}),
    "llama, linear, biases, tied": (
        "Llama",
        {
            **SMALL,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "mistral, window": ("Mistral", {**SMALL, "sliding_window": 7}),
    "mistral": ("Mistral", {**SMALL, "sliding_window": None}),
    "qwen2": ("Qwen2", {**SMALL, "tie_word_embeddings": True}),
    "qwen2, window": ("Qwen2", {**SMALL, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 16}),
    "smollm3": ("SmolLM3", {**SMALL, "num_hidden_layers": 4, "tie_word_embeddings": True, "pad_token_id": None}),
}


def save_random(folder: Path, name: str) -> Any:
    """A model of transformers with random weights, gains and biases included, saved in a folder."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{kind}{suffix}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1) * 0.5)
    model.eval().save_pretrained(folder)
    return model


def read_gpt(folder: Path) -> GPT:
    found = HuggingFaceModel.open(folder, "model.init_from")
    keys = {key: value for key, value in found.keys.items() if value is not None}
    model = GPT(ModelConfig(**keys), found.keys["vocab_size"])
    weights = found.weights(model.config, model.vocab_size)
    for name, variable in model.named_weights().items():
        variable.assign(weights[name])
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_greedy_text_and_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = save_random(tmp_path, name)
    ours = read_gpt(tmp_path)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (3, LENGTH)).astype(np.int32)
    expected = theirs(torch.from_numpy(tokens.astype(np.int64)), labels=torch.from_numpy(tokens.astype(np.int64)))
    np.testing.assert_allclose(ours(tokens).numpy(), expected.logits.detach().numpy(), atol=2e-5)

    cache, start = ours.empty_cache(3), 0
    for stop in (20, 21, 22, LENGTH):  # with cached keys and values too
        logits, cache = ours.extend(tf.constant(tokens[:, start:stop]), cache, tf.constant(start))
        np.testing.assert_allclose(logits.numpy(), expected.logits[:, start:stop].detach().numpy(), atol=2e-5)
        start = stop

    expected.loss.backward()
    with tf.GradientTape() as tape:
        losses = projected_cross_entropy(ours.features(tokens[:, :-1]), ours.output_table, tokens[:, 1:])
        loss = tf.reduce_sum(losses)
    count = tokens[:, 1:].size
    assert float(loss) / count == pytest.approx(float(expected.loss.detach()), rel=1e-5)
    weights = ours.named_weights()
    gradients = tape.gradient(loss, [variable.value for variable in weights.values()])
    folder = HuggingFaceModel.open(tmp_path, "folder")
    theirs_by_name = dict(theirs.named_parameters())
    from tfdp.interop.architectures import ARCHITECTURES
    from tfdp.interop.tensor_names import origins

    wanted = origins(ARCHITECTURES[folder.model_type], ours.config)
    for weight, gradient in zip(weights, gradients, strict=True):
        joined = wanted[weight].join([theirs_by_name[each].grad.numpy() for each in wanted[weight].names])
        error = np.linalg.norm(tf.convert_to_tensor(gradient) / count - joined)
        assert error <= 1e-4 * np.linalg.norm(joined), weight


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_that_is_read_and_written_holds_the_same(name: str, tmp_path: Path) -> None:
    theirs = save_random(tmp_path / "a", name)
    model = read_gpt(tmp_path / "a")
    weights = {key: variable.numpy() for key, variable in model.named_weights().items()}
    (tmp_path / "b").mkdir()
    write_model(tmp_path / "b", model.config, weights, theirs.config.eos_token_id or 0, theirs.config.model_type)
    first, second = TensorFolder(tmp_path / "a", "a"), TensorFolder(tmp_path / "b", "b")
    assert sorted(first.names) == sorted(second.names)
    for each in first.names:
        assert first.read(each).tobytes() == second.read(each).tobytes(), each
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert type(again) is type(theirs)
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)
    before, after = (json.loads((tmp_path / each / "config.json").read_text()) for each in "ab")
    dropout = {"attn_pdrop", "embd_pdrop", "resid_pdrop"}  # of training: model.dropout is not theirs
    documented = {
        "bos_token_id",
        "eos_token_id",
        "dtype",
        "rope_theta",
        "rope_scaling",
        "n_inner",
        "head_dim",
        *dropout,
    }
    ignored = {*documented, "transformers_version", "use_cache", "pad_token_id"}
    differing = {key for key in {*before, *after} - ignored if before.get(key) != after.get(key)}
    assert not {key for key in differing if key in before and key in after}, differing

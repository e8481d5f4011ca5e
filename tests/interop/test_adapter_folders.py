"""Adapters written in PEFT's form and read back, without PEFT: nothing is lost, and nothing strange is read."""

import json
from pathlib import Path

import numpy as np
import pytest

from tfdp.config.sections import LoraTarget, ModelConfig
from tfdp.interop import hugging_face
from tfdp.interop.peft import CONFIG_FILE, WEIGHTS_FILE, PeftModel, write_adapter
from tfdp.interop.tensor_folder import save_tensors
from tfdp.models import lora
from tfdp.models.dimensions import weight_shapes
from tfdp.system.exits import ConfigError

VOCABULARY = 40
SIZE = {"num_layers": 2, "num_heads": 4, "model_dim": 16, "context_length": 8, "vocab_size": VOCABULARY}
GPT2 = {
    **{"position": "learned", "norm": "layer_norm", "activation": "gelu", "use_bias": True, "qk_norm": False},
    **{"mlp_dim": 32, "tie_embeddings": True},
}
LLAMA = {"qk_norm": False, "num_kv_heads": 2, "mlp_dim": 24}


def saved(folder: Path, keys: dict[str, object], **adapters: object) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A base of random weights in Hugging Face's form, and beside it adapters for it."""
    generator = np.random.default_rng(0)
    model = ModelConfig(**{**SIZE, **keys, "lora_rank": 3, **adapters})
    plain = lora.merged_model(model)
    shapes = {**weight_shapes(plain, VOCABULARY), **lora.adapter_shapes(model)}
    weights = {name: generator.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    base = {name: weight for name, weight in weights.items() if not lora.is_adapter(name)}
    hugging_face.write_model(folder / "base", plain, base, 0)
    write_adapter(folder / "adapter", model, weights, "../base")
    return model, weights


def read(folder: Path) -> dict[str, np.ndarray]:
    found = PeftModel.open(folder / "adapter", "model.init_from")
    weights = found.weights(ModelConfig(**found.keys), VOCABULARY)
    return {name: weights[name] for name in weights}


@pytest.mark.parametrize(
    ("keys", "targets", "stabilised"),
    [
        (GPT2, None, False),
        (GPT2, ("query", "value"), True),
        (GPT2, ("up", "down"), False),
        (LLAMA, None, True),
        (LLAMA, ("key", "gate"), False),
    ],
)
def test_what_goes_out_comes_in_again(
    tmp_path: Path, keys: dict[str, object], targets: tuple[LoraTarget, ...] | None, stabilised: bool
) -> None:
    own = {} if targets is None else {"lora_targets": targets}
    model, weights = saved(tmp_path, keys, lora_alpha=5.0, lora_rank_stabilised=stabilised, **own)
    found = PeftModel.open(tmp_path / "adapter", "model.init_from")
    assert ModelConfig(**found.keys).adapted_targets == model.adapted_targets
    assert (found.keys["lora_rank"], found.keys["lora_alpha"]) == (3, 5.0)
    assert found.keys["lora_rank_stabilised"] is stabilised
    again = read(tmp_path)
    assert {*again} == {*weights}
    for name, weight in weights.items():
        np.testing.assert_array_equal(again[name], weight, err_msg=name)


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, LLAMA)
    path = tmp_path / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ConfigError, match=r"is an adapter for another base than .*base: digests differ"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "must be a plain LoRA adapter: use_dora is true"),
        ({"init_lora_weights": "pissa"}, 'must be a plain LoRA adapter: init_lora_weights is "pissa"'),
        ({"some_future_key": 3.0}, "must be a plain LoRA adapter: some_future_key is 3.0"),
        ({"base_model_name_or_path": "gone"}, "its base (gone) must be a folder with a model"),
        ({"r": None}, "must have a number or a truth value as r, but has null"),
        ({"r": 4.7}, "must have a number or a truth value as r, but has 4.7"),
        ({"use_rslora": "false"}, 'must have a number or a truth value as use_rslora, but has "false"'),
        ({"r": 4}, "of shape [16, 4], but has [16, 3]"),
    ],
)
def test_a_configuration_that_is_no_plain_adapter_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    saved(tmp_path, LLAMA)
    path = tmp_path / "adapter" / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigError) as caught:
        read(tmp_path)
    assert message in str(caught.value)


def test_tensors_that_are_missing_or_have_no_place_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, LLAMA)
    path = tmp_path / "adapter" / WEIGHTS_FILE
    tensors = {"base_model.model.somewhere.lora_A.weight": np.zeros((2, 2), np.float32)}
    save_tensors(tensors, path, {})
    with pytest.raises(ConfigError):
        read(tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors"):
        read(tmp_path)

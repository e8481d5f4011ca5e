"""Adapters in PEFT's folders: read from there, and written for it, the model computes the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.interop.test_transformers import LENGTH, VOCABULARY, save_random
from tfdp.config.sections import ModelConfig
from tfdp.interop.peft import PeftModel, write_adapter
from tfdp.models import lora
from tfdp.models.gpt import GPT
from tfdp.system.exits import ConfigError

torch = pytest.importorskip("torch", reason="needs pip install 'tfdp[peers]'")
transformers = pytest.importorskip("transformers", reason="needs pip install 'tfdp[peers]'")
peft = pytest.importorskip("peft", reason="needs pip install 'tfdp[peers]'")

pytestmark = pytest.mark.peers

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, attention": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_rslora": True}),
    "llama3": ("llama3", {"target_modules": ALL, "lora_alpha": 3}),
    "qwen2, two targets": ("qwen2", {"target_modules": ["q_proj", "v_proj"]}),
    "qwen3, stabilised": ("qwen3", {"target_modules": ALL, "use_rslora": True}),
}


def save_adapter(folder: Path, name: str) -> Any:
    """A model of PEFT with random adapters, saved beside its base."""
    of_base, settings = ADAPTERS[name]
    base = save_random(folder / "base", of_base)
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.eval().save_pretrained(folder / "adapter")
    return model


def read(folder: Path) -> tuple[GPT, dict[str, np.ndarray]]:
    found = PeftModel.open(folder, "model.init_from")
    model = ModelConfig(**{**found.keys, "init_from": None})
    weights = found.weights(model, found.keys["vocab_size"])
    return GPT(model, found.keys["vocab_size"], given=weights), {name: weights[name] for name in weights}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_come_in_and_go_out(name: str, tmp_path: Path) -> None:
    theirs = save_adapter(tmp_path, name)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (3, LENGTH)).astype(np.int32)
    expected = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.detach().numpy()
    ours, weights = read(tmp_path / "adapter")
    np.testing.assert_allclose(ours(tokens).numpy(), expected, atol=2e-5, rtol=2e-5)

    kind = "gpt2" if name.startswith("gpt2") else None
    (tmp_path / "ours").mkdir()
    write_adapter(tmp_path / "ours", ours.config, weights, str(tmp_path / "base"), kind)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    found = again(torch.from_numpy(tokens.astype(np.int64))).logits.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)
    back, same = read(tmp_path / "ours")
    assert back.config == ours.config
    for each in weights:
        np.testing.assert_array_equal(same[each], weights[each])

    merged = GPT(lora.merged_model(ours.config), VOCABULARY, given=lora.merged(ours.config, weights))
    np.testing.assert_allclose(merged(tokens).numpy(), expected, atol=2e-5, rtol=2e-5)


def test_what_is_no_plain_adapter_of_this_base_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, "llama3")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())

    def message(**changes: object) -> str:
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ConfigError) as caught:
            read(tmp_path / "adapter")
        return str(caught.value)

    assert "must be a plain LoRA adapter: use_dora is true" in message(use_dora=True)
    assert 'must be a plain LoRA adapter: init_lora_weights is "pissa"' in message(init_lora_weights="pissa")
    assert "must have one alpha for all modules: its alpha_pattern is" in message(alpha_pattern={"q_proj": 32})
    assert "its base (gone) must be a folder with a model" in message(base_model_name_or_path="gone")
    assert "must have a number or a truth value as r, but has null" in message(r=None)
    assert "must have a number or a truth value as r, but has 4.7" in message(r=4.7)
    assert 'must have a number or a truth value as use_rslora, but has "false"' in message(use_rslora="false")
    assert "must be a plain LoRA adapter: some_future_key is 3.0" in message(some_future_key=3.0)
    assert "must have block_0/attention/query_key_value/lora/query_a of shape [32, 5], but has [32, 4]" in message(r=5)


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, "llama3")
    model, weights = read(tmp_path / "adapter")
    (tmp_path / "ours").mkdir()
    write_adapter(tmp_path / "ours", model.config, weights, str(tmp_path / "other"))
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    read(tmp_path / "ours")
    changed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    changed.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"is an adapter for another base than .*other: digests differ"):
        read(tmp_path / "ours")

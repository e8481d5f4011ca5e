"""Presets of KerasHub, with small random weights, read as a GPT and written from one: the same numbers."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tfdp.config.sections import ModelConfig, SamplingConfig
from tfdp.data.tokenizers import bpe
from tfdp.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer, make_tokenizer
from tfdp.inference.sampling import Sampler
from tfdp.interop.keras_hub import KerasHubModel, is_folder, write_preset
from tfdp.models.dimensions import num_params, weight_shapes
from tfdp.models.gpt import GPT
from tfdp.system.exits import ConfigError

VOCABULARY, LENGTH = 96, 40
SMALL = {
    "vocabulary_size": VOCABULARY,
    "hidden_dim": 32,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_dim": 48,
}
GPT2 = {
    "vocabulary_size": VOCABULARY,
    "hidden_dim": 32,
    "num_layers": 12,  # "_1" and "_11" are two layers
    "num_heads": 4,
    "intermediate_dim": 48,
    "max_sequence_length": 64,
}
LLAMA3 = {
    "rope_max_wavelength": 1000,
    "rope_frequency_adjustment_factor": 4.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_pretraining_sequence_length": 16,
}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "llama": ("Llama", {**SMALL, "rope_max_wavelength": 500, "layer_norm_epsilon": 1e-3}),
    "llama3, scaled": ("Llama3", {**SMALL, **LLAMA3}),
    "mistral, window": ("Mistral", {**SMALL, "sliding_window": 7, "head_dim": 16}),
    "mistral, scaled": ("Mistral", {**SMALL, "sliding_window": None, "rope_scaling_factor": 3.0}),
    "qwen": ("Qwen", {**SMALL}),
    "qwen, window, untied": (
        "Qwen",
        {**SMALL, "use_sliding_window_attention": True, "sliding_window_size": 9, "tie_word_embeddings": False},
    ),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 16, "layer_norm_epsilon": 1e-5}),
    "qwen3, epsilon": ("Qwen3", {**SMALL, "head_dim": 16, "layer_norm_epsilon": 1e-1}),
    "qwen3, window, untied": (
        "Qwen3",
        {
            **SMALL,
            "head_dim": 16,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": False,
            "sliding_window_size": 6,
            "rope_scaling_factor": 2.0,
        },
    ),
}


def make_backbone(name: str, **others: Any) -> Any:
    """A backbone with random weights, gains and biases included."""
    import keras_hub

    kind, settings = BACKBONES[name]
    backbone = getattr(keras_hub.models, f"{kind}Backbone")(**settings, **others)
    numbers = np.random.default_rng(0)
    for variable in backbone.trainable_variables:
        variable.assign(numbers.normal(0.5 * (len(variable.shape) == 1), 0.2, variable.shape))
    return backbone


def theirs(backbone: Any, tokens: np.ndarray) -> np.ndarray:
    """The logits of a backbone."""
    features = backbone({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    return np.asarray(backbone.token_embedding(features, reverse=True))


def read_gpt(folder: Path) -> GPT:
    found = KerasHubModel.open(folder, "model.init_from")
    model = ModelConfig(**found.keys)
    return GPT(model, 1, given=found.weights(model, found.keys["vocab_size"]))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_preset_is_read_with_the_logits_of_kerashub(name: str, tmp_path: Path) -> None:
    backbone = make_backbone(name)
    backbone.save_to_preset(str(tmp_path))
    assert is_folder(tmp_path)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (3, LENGTH)).astype(np.int32)
    expected = theirs(backbone, tokens)
    found = read_gpt(tmp_path)(tokens).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_shards_and_bfloat16_are_read(tmp_path: Path) -> None:
    backbone = make_backbone("qwen3, window, untied", dtype="bfloat16")
    backbone.save_to_preset(str(tmp_path / "one"))
    backbone.save_to_preset(str(tmp_path / "several"), max_shard_size=2e-5)
    opened = [KerasHubModel.open(tmp_path / each, "key") for each in ("one", "several")]
    assert len(opened[0].files) == 1 and len(opened[1].files) > 1
    one, several = (each.weights(ModelConfig(**each.keys), VOCABULARY) for each in opened)
    for name in one:
        assert one[name].dtype == np.float32
        assert np.array_equal(one[name], several[name])
    embedding = np.asarray(backbone.token_embedding.embeddings.numpy(), np.float32)
    assert np.array_equal(one["token_embedding"], embedding)


OURS = {"num_layers": 2, "num_heads": 4, "model_dim": 32, "context_length": 48}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("Qwen3", {}),
    "gains, window, tied": (
        "Qwen3",
        {"qk_norm_gain": True, "sliding_window": 5, "head_dim": 16, "num_kv_heads": 2, "tie_embeddings": True},
    ),
    "epsilon": ("Qwen3", {"norm_epsilon": 1e-2}),
    "gpt2": (
        "GPT2",
        {
            "position": "learned",
            "norm": "layer_norm",
            "activation": "gelu",
            "use_bias": True,
            "tie_embeddings": True,
            "qk_norm": False,
        },
    ),
    "llama, tied": ("Llama3", {"qk_norm": False, "tie_embeddings": True, "norm_epsilon": 1e-3}),
    "llama3": (
        "Llama3",
        {"qk_norm": False, "rope_scaling": "llama3", "rope_original_context_length": 16, "rope_scaling_factor": 4.0},
    ),
    "mistral": ("Mistral", {"qk_norm": False, "sliding_window": 5, "num_kv_heads": 2, "head_dim": 16}),
    "linear": ("Mistral", {"qk_norm": False, "rope_scaling": "linear", "rope_scaling_factor": 2.0}),
    "qwen": ("Qwen", {"qk_norm": False, "qkv_bias": True, "tie_embeddings": True}),
}


def make_gpt(name: str, vocab_size: int) -> GPT:
    config = ModelConfig(**OURS, **MODELS[name][1], zero_init=False)
    model, numbers = GPT(config, vocab_size), np.random.default_rng(1)
    for variable in model.named_weights().values():
        variable.assign(numbers.normal(0.5 * (len(variable.shape) == 1), 0.2, variable.shape))
    return model


def arrays(model: GPT) -> dict[str, np.ndarray]:
    return {name: variable.numpy() for name, variable in model.named_weights().items()}


@pytest.fixture(scope="module")
def trained_bpe(corpus_dir: Path) -> bpe.BytePairTokenizer:
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus_dir.iterdir())]
    code = "def f(x):\n        return x + 1\n\n\nclass A:\n    pass\n"
    return bpe.train([*texts, code * 50], 320)


PROMPT = "def f(x):\n        return alpha, été\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_written_generates_in_kerashub_as_here(name: str, tmp_path: Path) -> None:
    check_written(name, ByteTokenizer(), tmp_path)


def test_the_default_model_generates_in_kerashub_as_here(tmp_path: Path, trained_bpe: bpe.BytePairTokenizer) -> None:
    check_written("default", trained_bpe, tmp_path)


def check_written(name: str, tokenizer: Tokenizer, folder: Path) -> None:
    import keras_hub

    model = make_gpt(name, tokenizer.vocab_size)
    weights = arrays(model)
    write_preset(folder, model.config, weights, tokenizer)

    task = keras_hub.models.CausalLM.from_preset(str(folder))
    assert type(task).__name__ == f"{MODELS[name][0]}CausalLM"
    tokens = np.random.default_rng(0).integers(0, tokenizer.vocab_size, (3, LENGTH)).astype(np.int32)
    expected = model(tokens).numpy()
    found = np.asarray(task({"token_ids": tokens, "padding_mask": np.ones_like(tokens)}))
    np.testing.assert_allclose(found, expected, atol=1e-5)

    prompt = PROMPT[:12]
    ids = np.asarray(task.preprocessor.generate_preprocess([PROMPT], sequence_length=LENGTH)["token_ids"])[0]
    own = [tokenizer.end_of_text, *tokenizer.encode(PROMPT).tolist()][:LENGTH]
    assert ids[: len(own)].tolist() == own
    task.compile(sampler="greedy")
    length = len(tokenizer.encode(prompt)) + 1 + 16
    text = task.generate(prompt, max_length=length, strip_prompt=True)
    sampled = list(Sampler(model, tokenizer).tokens(prompt, SamplingConfig(num_tokens=16, temperature=0)))
    assert len(sampled) > 2
    assert text == task.preprocessor.tokenizer.detokenize(sampled)
    if "\ufffd" not in tokenizer.decode(np.array(sampled)):
        assert text == tokenizer.decode(np.array(sampled))

    again = KerasHubModel.open(folder, "key")
    kept = again.weights(ModelConfig(**again.keys), again.keys["vocab_size"])
    for each, weight in weights.items():
        if name == "epsilon" and "query_key_value" in each:  # scaled, and back
            np.testing.assert_allclose(kept[each], weight, rtol=2e-7)
        else:
            assert kept[each].tobytes() == weight.tobytes(), each
    assert all(np.all(kept[each] == 1) for each in {*kept} - {*weights})
    assert again.keys["context_length"] == model.config.context_length
    assert make_tokenizer(again.tokenizer).fingerprint == tokenizer.fingerprint


def test_what_kerashub_has_no_form_for_is_one_line(tmp_path: Path, trained_bpe: bpe.BytePairTokenizer) -> None:
    def refusal(tokenizer: Tokenizer, **keys: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            write_preset(tmp_path, ModelConfig(**OURS, **keys), {}, tokenizer)
        return str(caught.value)

    bytes_only = ByteTokenizer()
    head = "format (keras_hub) has no backbone for this model; the nearest is "
    assert refusal(bytes_only, norm="layer_norm") == f"{head}Qwen3: model.norm (layer_norm) must be rms_norm"
    gpt2_like = MODELS["gpt2"][1]
    told = f"{head}GPT2: model.norm_epsilon (1e-06) must be 1e-05; model.tie_embeddings (False) must be True"
    assert refusal(bytes_only, **{**gpt2_like, "norm_epsilon": 1e-6, "tie_embeddings": False}) == told
    assert "model.layers_without_rope ((1,)) must be ()" in refusal(bytes_only, layers_without_rope=(1,))
    assert "model.rope_scaling (llama3) must be none" in refusal(bytes_only, rope_scaling="llama3")
    gpt2 = bpe.BytePairTokenizer(trained_bpe.vocabulary, trained_bpe.merges, "gpt2")
    assert f"has no tokenizer that equals this one ({gpt2.name}): KerasHub cuts text as bpe:FOLDER" in refusal(gpt2)
    tags = bpe.BytePairTokenizer({**trained_bpe.vocabulary, "</s>": 400}, trained_bpe.merges, "keras")
    assert "its vocabulary has </s>, which is a special token there" in refusal(tags)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_what_kerashub_computes_otherwise_than_it_says_is_still_so() -> None:
    """Each is a reason to refuse or to scale something; where one fails, KerasHub is mended and so can we be."""
    import keras_hub

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (3, LENGTH)).astype(np.int32)
    llama = [make_backbone("llama"), make_backbone("llama", rope_position_scaling_factor=4.0)]
    assert np.array_equal(*(theirs(each, tokens) for each in llama))
    assert "tie_word_embeddings" not in make_backbone("llama", tie_word_embeddings=True).get_config()
    layer = make_backbone("qwen3, epsilon").transformer_layers[0]
    assert layer._self_attention_layernorm.epsilon == 0.1
    assert layer._self_attention_layer._query_dense_layer_norm.epsilon == 1e-5
    qwen = keras_hub.models.QwenCausalLM(make_backbone("qwen, window, untied"))
    with pytest.raises(Exception, match="Using a symbolic"):
        qwen.generate({"token_ids": tokens, "padding_mask": tokens < 50}, stop_token_ids=None)


def change(folder: Path, **values: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["config"] = {key: value for key, value in {**content["config"], **values}.items() if value != "leave out"}
    (folder / "config.json").write_text(json.dumps(content))


def rename(folder: Path, name: str) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"registered_name": name}))


def damage_weights(folder: Path) -> None:
    data = (folder / "model.weights.h5").read_bytes()
    (folder / "model.weights.h5").write_bytes(data[: len(data) // 2])


def link_weights(folder: Path) -> None:
    (folder / "elsewhere").write_bytes(bytes(4 * 32))
    with h5py.File(folder / "model.weights.h5", "r+") as file:
        del file["layers/qwen3_layer_norm/vars/0"]
        file.create_dataset("layers/qwen3_layer_norm/vars/0", (32,), "f4", external=[(folder / "elsewhere", 0, 128)])


def remove_tensor(folder: Path) -> None:
    with h5py.File(folder / "model.weights.h5", "r+") as file:
        del file["layers/qwen3_layer_norm/vars/0"]


def add_tensor(folder: Path) -> None:
    with h5py.File(folder / "model.weights.h5", "r+") as file:
        file["layers/lora/vars/0"] = np.zeros(3, np.float32)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "config.json").write_text("{"), "must hold the config.json of a KerasHub preset"),
    (lambda folder: rename(folder, "keras_hub>GemmaBackbone"), "must be a backbone that tfdp reads (GPT2Backbone, "),
    (lambda folder: change(folder, logit_soft_cap=30.0), "whose effect tfdp does not know: logit_soft_cap 30.0"),
    (lambda folder: change(folder, hidden_dim="leave out"), "must have hidden_dim in its config.json"),
    (lambda folder: change(folder, hidden_dim="wide"), "a value of its config.json is not of its type: "),
    (lambda folder: change(folder, num_layers=1.5), "a value of its config.json is not of its type: "),
    (lambda folder: change(folder, rope_low_freq_factor=1.0), "tfdp does not know: rope_low_freq_factor 1.0"),
    (lambda folder: change(folder, dtype={"config": {"name": "int8_from_float32"}}), "but has the dtype policy int8"),
    (lambda folder: change(folder, intermediate_dim=64), "of shape [32, 64], but has [32, 48]"),
    (lambda folder: change(folder, num_layers=1), "holds a tensor that its backbone has no place for: layers/qwen3"),
    (lambda folder: (folder / "model.weights.h5").unlink(), "must hold a whole model.weights.h5: no such file"),
    (damage_weights, "must hold a whole model.weights.h5: "),
    (link_weights, "must hold its tensors itself, but layers/qwen3_layer_norm/vars/0 names other files"),
    (remove_tensor, "must hold layers/qwen3_layer_norm/vars/0 in model.weights.h5"),
    (add_tensor, "holds a tensor that its backbone has no place for: layers/lora/vars/0"),
    (lambda folder: (folder / "preprocessor.json").write_text("[1]"), "must hold a whole preprocessor.json"),
]


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preset")
    make_backbone("qwen3").save_to_preset(str(folder))
    return folder


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_preset_that_is_not_understood_is_one_line(
    preset: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = shutil.copytree(preset, tmp_path / "bad")
    damage(folder)
    with pytest.raises(ConfigError) as caught:
        found = KerasHubModel.open(folder, "model.init_from")
        found.weights(ModelConfig(**found.keys), found.keys["vocab_size"])
    assert str(caught.value).startswith(f"model.init_from ({folder}) ") or "not of its type" in message
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_preset_is_read_without_tensorflow(preset: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from tfdp.config.sections import ModelConfig
from tfdp.interop.keras_hub import KerasHubModel
found = KerasHubModel.open(Path({str(preset)!r}), "key")
print(sum(weight.size for weight in found.weights(ModelConfig(**found.keys), {VOCABULARY}).values()))
print([name for name in ("tensorflow", "keras", "keras_hub") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    model = ModelConfig(**KerasHubModel.open(preset, "key").keys)
    assert done.stdout.split("\n")[:2] == [str(num_params(weight_shapes(model, VOCABULARY))), "[]"], done.stderr


def test_a_tokenizer_that_is_not_read_says_so_when_it_is_asked_for(preset: Path, tmp_path: Path) -> None:
    found = KerasHubModel.open(preset, "model.init_from")
    with pytest.raises(ConfigError, match=r"must hold the tokenizer.json of a KerasHub preset \(No such"):
        found.tokenizer  # noqa: B018
    folder = shutil.copytree(preset, tmp_path / "other")
    (folder / "tokenizer.json").write_text(json.dumps({"registered_name": "keras_hub>Qwen3Tokenizer", "config": {}}))
    with pytest.raises(ConfigError, match=r"has a tokenizer that tfdp does not read \(Qwen3Tokenizer\): name another"):
        KerasHubModel.open(folder, "model.init_from").tokenizer  # noqa: B018


@pytest.mark.parametrize("in_graph", [True, False])
def test_a_tokenizer_with_another_end_of_text_is_one_of_gpt2(
    in_graph: bool, tmp_path: Path, trained_bpe: bpe.BytePairTokenizer
) -> None:
    """Its files are read without the form of tfdp beside them: as they are cut in the graph, or as GPT-2 cut them."""
    vocabulary = {token: index + 7 for token, index in trained_bpe.vocabulary.items()}
    pattern = "keras" if in_graph else "gpt2"
    tokenizer = bpe.BytePairTokenizer(vocabulary, trained_bpe.merges, pattern)
    if in_graph:
        model = make_gpt("default", tokenizer.vocab_size)
        write_preset(tmp_path, model.config, arrays(model), tokenizer)
        shutil.rmtree(tmp_path / "tfdp_tokenizer")
    else:
        import keras_hub

        make_backbone("gpt2").save_to_preset(str(tmp_path))
        keras_hub.models.GPT2Tokenizer(vocabulary, trained_bpe.merges).save_to_preset(str(tmp_path))
    name = KerasHubModel.open(tmp_path, "key").tokenizer
    assert name.startswith("bpe:" if in_graph else "gpt2:")
    assert make_tokenizer(name).fingerprint == tokenizer.fingerprint

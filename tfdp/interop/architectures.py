"""The architectures of Hugging Face's transformers that a GPT can equal, and their `config.json`.

`model_keys` reads a `config.json` into the keys of section `model`, `config_json` writes one. Both are exact or refuse:
a key of `config.json` that nobody here knows may change what the model computes, and a model that no architecture
equals cannot be written as one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tfdp.config.sections import ModelConfig
from tfdp.interop.model_forms import nearest, normal_form, written_form
from tfdp.system.exits import ConfigError
from tfdp.system.messages import shown

# Keys of `config.json` that change no logit: bookkeeping, special tokens, and what only training looks at.
_WITHOUT_EFFECT = {
    "_model_name_or_path",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_pdrop",
    "bos_token_id",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "initializer_range",
    "is_llama_config",
    "max_window_layers",  # read with use_sliding_window
    "model_type",
    "n_ctx",
    "no_rope_layer_interval",  # read with no_rope_layers
    "pad_token_id",
    "reorder_and_upcast_attn",
    "resid_pdrop",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}
# Keys that are understood with these values only.
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "hidden_act": ("silu",),
    "pretraining_tp": (0, 1),  # more would split products, which changes nothing but their rounding
    "scale_attn_weights": (True,),
}
_ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}
_WINDOW_KEYS = {"sliding_window", "use_sliding_window", "layer_types"}
_LLAMA3_KEYS = {  # of rope scaling, and ours
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_frequency_factor",
    "high_freq_factor": "rope_high_frequency_factor",
    "original_max_position_embeddings": "rope_original_context_length",
}
_NAMES = {
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "max_position_embeddings": "context_length",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_epsilon",
}
_ROTARY = {
    "position": ("rope",),
    "norm": ("rms_norm",),
    "activation": ("swiglu",),
    "use_bias": (False,),
    "qkv_bias": (False,),
    "qk_norm": (False,),
    "sliding_window": (None,),
    "layers_without_rope": ((),),
}


@dataclass(frozen=True)
class Architecture:
    """What a model can be under one name.

    Attributes:
      model_type, class_name: its names in `config.json`.
      allows: values of the keys of section `model` that it can have; keys that are not here are free.
      names: keys of `config.json`, and the keys of section `model` that they are.
      defaults: of `config.json`, where transformers has others than nothing.
      biases: whether attention_bias and mlp_bias are its keys.
      optional: keys of section `model` that follow from others where `config.json` lacks them.
    """

    model_type: str
    class_name: str
    allows: Mapping[str, tuple[Any, ...]]
    names: Mapping[str, str] = field(default_factory=lambda: _NAMES)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    biases: bool = False
    optional: tuple[str, ...] = ("head_dim",)

    @property
    def is_rotary(self) -> bool:
        return self.allows["position"] == ("rope",)


def _free(*keys: str) -> dict[str, tuple[Any, ...]]:
    return {key: values for key, values in _ROTARY.items() if key not in keys}


_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0}

# In the order in which a model is compared with them.
ARCHITECTURES = {
    each.model_type: each
    for each in (
        Architecture(
            "gpt2",
            "GPT2LMHeadModel",
            {
                **_ROTARY,
                "position": ("learned",),
                "norm": ("layer_norm",),
                "activation": ("gelu",),
                "use_bias": (True,),
                "qkv_bias": (True,),
                "num_kv_heads": (None,),
                "head_dim": (None,),
            },
            {
                "n_embd": "model_dim",
                "n_layer": "num_layers",
                "n_head": "num_heads",
                "n_positions": "context_length",
                "n_inner": "mlp_dim",
                "layer_norm_epsilon": "norm_epsilon",
            },
            {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
            optional=("mlp_dim",),
        ),
        Architecture(
            "llama",
            "LlamaForCausalLM",
            _free("use_bias", "qkv_bias"),
            defaults=_DEFAULTS,
            biases=True,
            optional=("head_dim", "num_kv_heads"),
        ),
        Architecture("mistral", "MistralForCausalLM", _free("sliding_window"), defaults=_DEFAULTS),
        Architecture("qwen2", "Qwen2ForCausalLM", {**_free("sliding_window"), "qkv_bias": (True,)}, defaults=_DEFAULTS),
        Architecture(
            "qwen3",
            "Qwen3ForCausalLM",
            {**_free("sliding_window"), "qk_norm": (True,)},
            defaults={**_DEFAULTS, "head_dim": 128},
        ),
        Architecture(
            "smollm3",
            "SmolLM3ForCausalLM",
            _free("sliding_window", "layers_without_rope"),
            defaults={**_DEFAULTS, "tie_word_embeddings": True, "rope_theta": 2_000_000.0},
        ),
    )
}


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------


def model_keys(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of section `model` that a `config.json` means.

    Args:
      config: what the file holds.
      where: the file, as messages name it: "model.init_from (FOLDER)".

    Raises:
      ConfigError: an architecture that is not read, a key that is missing, or one whose effect is not known.
    """
    architecture = _architecture_named(config, where)
    _refuse_unknown(config, architecture, where)
    if not isinstance(config.get("vocab_size"), int):
        raise ConfigError(f"{where} must have vocab_size in its config.json")
    given = {**architecture.defaults, **{key: value for key, value in config.items() if value is not None}}
    keys: dict[str, Any] = {own: given.get(name) for name, own in architecture.names.items()}
    for name, own in architecture.names.items():
        if keys[own] is None and own not in architecture.optional:
            raise ConfigError(f"{where} must have {name} in its config.json")
    only = {key: values[0] for key, values in architecture.allows.items() if len(values) == 1}
    only = {key: list(value) if isinstance(value, tuple) else value for key, value in only.items()}
    keys = {**only, **keys, "tie_embeddings": given["tie_word_embeddings"], "vocab_size": given.get("vocab_size")}
    if architecture.biases:
        keys["use_bias"] = keys["qkv_bias"] = _common_bias(given, where)
    if architecture.is_rotary:
        keys |= _rope_keys(given, where) | _window_keys(given, keys["num_layers"], architecture, where)
        keys["qk_norm_gain"] = keys["qk_norm"]
    keys["qkv_bias"] = None if keys["qkv_bias"] == keys["use_bias"] else keys["qkv_bias"]
    return keys


def _architecture_named(config: Mapping[str, Any], where: str) -> Architecture:
    name = config.get("model_type")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"{where} must be a model of an architecture that tfdp reads ({known}), but is {shown(name)}")
    return ARCHITECTURES[name]


def _refuse_unknown(config: Mapping[str, Any], architecture: Architecture, where: str) -> None:
    known = {*_WITHOUT_EFFECT, *architecture.names, "tie_word_embeddings", "vocab_size"}
    if architecture.is_rotary:
        known |= _ROPE_KEYS | _WINDOW_KEYS | {"no_rope_layers"}
    if architecture.biases:
        known |= {"attention_bias", "mlp_bias"}
    for key, value in config.items():
        if key in _EXPECTED and value is not None and value not in _EXPECTED[key]:
            raise ConfigError(
                f"{where} must have {key} {_json(_EXPECTED[key][0])} in its config.json, but has {_json(value)}"
            )
        is_off = value is None or value is False or value in ([], {})  # but not 0, which may be a factor
        if key not in known and key not in _EXPECTED and not is_off:
            raise ConfigError(
                f"{where} has a key in its config.json whose effect tfdp does not know: {key} {_json(value)}"
            )


def _json(value: Any) -> str:
    return shown(json.dumps(value))


def _common_bias(given: Mapping[str, Any], where: str) -> bool:
    attention, mlp = bool(given.get("attention_bias")), bool(given.get("mlp_bias"))
    if attention != mlp:
        raise ConfigError(f"{where} must have attention_bias and mlp_bias alike, but has {attention} and {mlp}")
    return attention


def _rope_keys(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """From rope_parameters (transformers 5), or rope_theta and rope_scaling (before)."""
    rope = given.get("rope_parameters") or {"rope_theta": given["rope_theta"], **(given.get("rope_scaling") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    numbers: dict[str, str] = {"linear": {"factor": _LLAMA3_KEYS["factor"]}, "llama3": _LLAMA3_KEYS}.get(kind, {})
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(
            f"{where} must have rotary positions of type default, linear or llama3, but has {shown(kind)}"
        )
    for key, value in rope.items():
        if key not in ("rope_theta", "rope_type", "type", *numbers) and value not in (None, 1.0):
            raise ConfigError(
                f"{where} has a key of rope scaling whose effect tfdp does not know: {key} {shown(value)}"
            )
    missing = [key for key in numbers if rope.get(key) is None]
    if missing:
        raise ConfigError(f"{where} must have {missing[0]} in its rope scaling")
    found = {own: rope[name] for name, own in numbers.items()}
    return {"rope_theta": float(rope["rope_theta"]), "rope_scaling": "none" if kind == "default" else kind, **found}


def _window_keys(given: Mapping[str, Any], num_layers: int, architecture: Architecture, where: str) -> dict[str, Any]:
    """The window of attention, if it is the same in all layers, and the layers without positions."""
    window = given.get("sliding_window")
    if "use_sliding_window" in given and not given["use_sliding_window"]:
        window = None
    first = min(given.get("max_window_layers", 0), num_layers) if given.get("use_sliding_window") else 0
    by_number = ["full_attention"] * first + ["sliding_attention"] * (num_layers - first)
    kinds = set(given.get("layer_types") or by_number)
    if window is not None and len(kinds) > 1:
        raise ConfigError(
            f"{where} must attend alike in all layers, but layer_types names {' and '.join(sorted(kinds))}"
        )
    found: dict[str, Any] = {"sliding_window": window if kinds == {"sliding_attention"} else None}
    if "layers_without_rope" not in architecture.allows:
        with_rope = given.get("no_rope_layers") or [(layer + 1) % 4 != 0 for layer in range(num_layers)]
        found["layers_without_rope"] = [layer for layer, has_rope in enumerate(with_rope) if not has_rope]
    return found


# ---------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------


def architecture_of(model: ModelConfig, preferred: str | None = None) -> Architecture:
    """The architecture that a model equals.

    Args:
      preferred: its model_type, of several that fit: a Mistral without a window is a Llama too.

    Raises:
      ConfigError: none does; it names the keys in which the nearest one differs.
    """
    own = normal_form(model)
    allowed = {name: dict(each.allows) for name, each in ARCHITECTURES.items()}
    allowed["llama"]["qkv_bias"] = (own["use_bias"],)  # biases everywhere or nowhere
    return ARCHITECTURES[nearest(allowed, own, "format (huggingface) has no architecture", preferred or "")]


def config_json(
    model: ModelConfig, architecture: Architecture, vocab_size: int, end_of_text: int, dtype: str
) -> dict[str, Any]:
    """What `config.json` says of a model that equals an architecture."""
    keys = written_form(model)
    written = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **{name: keys[own] for name, own in architecture.names.items()},
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,  # some architectures have one by default, beyond a small vocabulary
        "initializer_range": model.init_stddev,
        "dtype": dtype,
    }
    if not architecture.is_rotary:
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        return {**written, "activation_function": "gelu_new", **dropout}
    scaling = {name: keys[own] for name, own in _LLAMA3_KEYS.items()} if model.rope_scaling == "llama3" else {}
    if model.rope_scaling == "linear":
        scaling = {"factor": model.rope_scaling_factor}
    kind = "default" if model.rope_scaling == "none" else model.rope_scaling
    written |= {
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_theta": model.rope_theta,  # this and rope_scaling for transformers 4, rope_parameters for 5
        "rope_scaling": {"rope_type": kind, **scaling} if scaling else None,
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": kind, **scaling},
    }
    if architecture.biases:
        written |= {"attention_bias": model.use_bias, "mlp_bias": model.use_bias}
    if "sliding_window" not in architecture.allows:
        written["sliding_window"] = model.sliding_window
        if architecture.model_type != "mistral":
            reach = "full_attention" if model.sliding_window is None else "sliding_attention"
            written |= {"use_sliding_window": model.sliding_window is not None}
            written |= {"layer_types": [reach] * model.num_layers}
            written |= {"max_window_layers": 0} if model.sliding_window is not None else {}
    if "layers_without_rope" not in architecture.allows:
        without = model.layers_without_rope
        written["no_rope_layers"] = [int(layer not in without) for layer in range(model.num_layers)]
    return written

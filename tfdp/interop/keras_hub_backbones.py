"""The backbones of KerasHub that a GPT can equal, and their configuration.

Both directions are exact or refuse. What a backbone computes is not always what its configuration says: what is noted
here as a quirk was seen in KerasHub 0.32, and a value that a quirk touches is refused rather than guessed at.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tfdp.config.sections import ModelConfig
from tfdp.interop.model_forms import nearest, normal_form, written_form
from tfdp.system.exits import ConfigError
from tfdp.system.messages import shown

# Keys of a backbone's configuration that change no logit.
_WITHOUT_EFFECT = {"name", "trainable", "dtype", "dropout"}
_LLAMA3_KEYS = {  # of rope scaling, all or none, and ours
    "rope_frequency_adjustment_factor": "rope_scaling_factor",
    "rope_low_freq_factor": "rope_low_frequency_factor",
    "rope_high_freq_factor": "rope_high_frequency_factor",
    "rope_pretraining_sequence_length": "rope_original_context_length",
}
_NAMES = {
    "hidden_dim": "model_dim",
    "num_layers": "num_layers",
    "num_query_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_dim": "mlp_dim",
    "rope_max_wavelength": "rope_theta",
    "layer_norm_epsilon": "norm_epsilon",
    "vocabulary_size": "vocab_size",
}
_ROTARY: dict[str, tuple[Any, ...]] = {
    "position": ("rope",),
    "layers_without_rope": ((),),
    "norm": ("rms_norm",),
    "activation": ("swiglu",),
    "use_bias": (False,),
    "qkv_bias": (False,),
    "qk_norm": (False,),
    "head_dim": (None,),
    "sliding_window": (None,),
    "rope_scaling": ("none", "linear"),
}


@dataclass(frozen=True)
class Backbone:
    """What a model can be under one name.

    Attributes:
      name: of its classes, without the suffix Backbone.
      allows: values of the keys of section `model` that it can have; keys that are not here are free.
      names: keys of its configuration, and the keys of section `model` that they are.
      layers: what Keras calls its blocks in a file of weights.
      final_norm: and the norm after them.
      others: more keys of its configuration that are understood.
      defaults: of its configuration, for keys that files lack.
    """

    name: str
    allows: Mapping[str, tuple[Any, ...]]
    layers: str
    final_norm: str
    names: Mapping[str, str] = field(default_factory=lambda: _NAMES)
    others: tuple[str, ...] = ("rope_scaling_factor", "tie_word_embeddings")
    defaults: Mapping[str, Any] = field(default_factory=lambda: {"tie_word_embeddings": True})

    @property
    def is_gpt2(self) -> bool:
        return self.name == "GPT2"


def _llama(name: str) -> Backbone:
    # Quirk: rope_position_scaling_factor is stored and has no effect, so linear scaling cannot be written.
    allows = {**_ROTARY, "rope_scaling": ("none", "llama3")}
    others = ("rope_position_scaling_factor", "tie_word_embeddings", *_LLAMA3_KEYS)
    defaults = {"tie_word_embeddings": False}  # quirk: a Llama takes this key, and does not write it
    return Backbone(name, allows, "llama_transformer_decoder", "llama_layer_norm", others=others, defaults=defaults)


# In the order in which a model is compared with them: of several that are equally near, the first is told.
BACKBONES = {
    each.name: each
    for each in (
        Backbone(
            "GPT2",
            {
                **_ROTARY,
                "position": ("learned",),
                "norm": ("layer_norm",),
                "activation": ("gelu",),
                "use_bias": (True,),
                "qkv_bias": (True,),
                "num_kv_heads": (None,),
                "norm_epsilon": (1e-5,),
                "tie_embeddings": (True,),
                "rope_scaling": ("none", "linear", "llama3"),  # without rotary positions they mean nothing
            },
            "transformer_decoder",
            "layer_normalization",
            {
                "hidden_dim": "model_dim",
                "num_layers": "num_layers",
                "num_heads": "num_heads",
                "intermediate_dim": "mlp_dim",
                "max_sequence_length": "context_length",
                "vocabulary_size": "vocab_size",
            },
            others=(),
            defaults={},
        ),
        Backbone(
            "Qwen3",
            {
                **{key: values for key, values in _ROTARY.items() if key not in ("head_dim", "sliding_window")},
                "qk_norm": (True,),
            },
            "qwen3_transformer_decoder",
            "qwen3_layer_norm",
            {**_NAMES, "head_dim": "head_dim", "sliding_window_size": "sliding_window"},
        ),
        _llama("Llama3"),
        _llama("Llama"),
        Backbone(
            "Mistral",
            {
                **{key: values for key, values in _ROTARY.items() if key not in ("head_dim", "sliding_window")},
                "tie_embeddings": (False,),
            },
            "mistral_transformer_decoder",
            "mistral_layer_normalization",
            {**_NAMES, "head_dim": "head_dim", "sliding_window": "sliding_window"},
            others=("rope_scaling_factor",),
            defaults={"head_dim": None, "tie_word_embeddings": False},
        ),
        Backbone(  # quirk: with a window it cannot generate, so none is written
            "Qwen",
            {**_ROTARY, "qkv_bias": (True,)},
            "qwen_transformer_decoder",
            "qwen_layer_norm",
            others=(
                "rope_scaling_factor",
                "tie_word_embeddings",
                "use_sliding_window_attention",
                "sliding_window_size",
            ),
        ),
    )
}


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------


def model_keys(backbone: Backbone, config: Mapping[str, Any], context_length: int, where: str) -> dict[str, Any]:
    """The keys of section `model` that the configuration of a backbone means.

    Args:
      context_length: of a backbone whose configuration has none.
      where: the file, as messages name it.

    Raises:
      ConfigError: a key is missing, or has a value whose effect is not known here.
    """
    given = {**backbone.defaults, **config}
    known = {*_WITHOUT_EFFECT, *backbone.names, *backbone.others}
    for name, value in config.items():
        if name not in known:
            raise ConfigError(
                f"{where} has a key in its config.json whose effect tfdp does not know: {name} {shown(value)}"
            )
    keys: dict[str, Any] = {own: values[0] for own, values in backbone.allows.items() if len(values) == 1}
    keys["layers_without_rope"] = []
    for name, own in backbone.names.items():
        if name not in given:
            raise ConfigError(f"{where} must have {name} in its config.json")
        keys[own] = given[name]
    keys.setdefault("context_length", context_length)
    if not backbone.is_gpt2:
        keys |= _rotary_keys(backbone, given, where)
    keys["qkv_bias"] = None if keys["qkv_bias"] == keys["use_bias"] else keys["qkv_bias"]
    return keys


def _rotary_keys(backbone: Backbone, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What depends on the values of several keys."""
    if given.get("rope_position_scaling_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{where} must have rope_position_scaling_factor 1.0 in its config.json: another value has no effect in "
            f"KerasHub, and has one elsewhere"
        )
    found: dict[str, Any] = {"rope_theta": float(given["rope_max_wavelength"])}
    found["qk_norm_gain"] = backbone.allows["qk_norm"] == (True,)
    found["tie_embeddings"] = given["tie_word_embeddings"]
    scaling = {own: given.get(name) for name, own in _LLAMA3_KEYS.items()}
    factor = given.get("rope_scaling_factor", 1.0)
    if any(value is not None for value in scaling.values()):
        for name, own in _LLAMA3_KEYS.items():
            if scaling[own] is None:
                raise ConfigError(f"{where} must have {name} in its config.json")
        found |= {"rope_scaling": "llama3", **scaling}
    elif factor != 1.0:
        found |= {"rope_scaling": "linear", "rope_scaling_factor": factor}
    else:
        found["rope_scaling"] = "none"
    if backbone.name == "Qwen":
        windowed = given.get("use_sliding_window_attention", False)
        found["sliding_window"] = given.get("sliding_window_size") if windowed else None
    return found


# ---------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------


def backbone_of(model: ModelConfig) -> Backbone:
    """The backbone that a model equals. Raises `ConfigError` where none does: it names the keys in the way."""
    allowed = {each.name: each.allows for each in BACKBONES.values()}
    return BACKBONES[nearest(allowed, normal_form(model), "format (keras_hub) has no backbone", "")]


def backbone_config(model: ModelConfig, backbone: Backbone, vocab_size: int) -> dict[str, Any]:
    """The arguments with which KerasHub makes a backbone that equals a model."""
    keys = {**written_form(model), "vocab_size": vocab_size}
    config = {name: keys[own] for name, own in backbone.names.items()}
    config |= {"dropout": 0.0, "dtype": "float32"}
    if model.rope_scaling == "llama3" and not backbone.is_gpt2:
        config |= {name: keys[own] for name, own in _LLAMA3_KEYS.items()}
    if model.rope_scaling == "linear" and not backbone.is_gpt2:
        config["rope_scaling_factor"] = model.rope_scaling_factor
    if "tie_embeddings" not in backbone.allows:
        config["tie_word_embeddings"] = model.tie_embeddings
    return config

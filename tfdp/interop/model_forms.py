"""What all formats of models share: keys read from a file, and the form of theirs that a model equals."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from tfdp.config import options
from tfdp.config.parsing import known_keys
from tfdp.config.sections import ModelConfig
from tfdp.models.dimensions import weight_shapes
from tfdp.system.exits import ConfigError
from tfdp.system.messages import one_line, shown


def typed_keys(read: Callable[[], Mapping[str, Any]], where: str, file: str) -> dict[str, Any]:
    """The keys of section `model` that a file says, each of its type.

    Args:
      read: gives them by name.
      where: what to blame: the configuration key and the folder.
      file: that they come from.

    Raises:
      ConfigError: what `read` raises about `where`, or a value that is not of its type.
    """
    try:
        kinds = known_keys(ModelConfig)
        return {own: options.read(f"model.{own}", kinds[own], value) for own, value in read().items()}
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        if isinstance(error, ConfigError) and str(error).startswith(where):
            raise
        raise ConfigError(f"{where}: a value of its {file} is not of its type: {one_line(str(error))}") from None


def normal_form(model: ModelConfig) -> dict[str, Any]:
    """The keys with nothing left to be derived: what is the default is null, but for biases."""
    keys = asdict(model)
    keys["qkv_bias"] = model.has_qkv_bias
    keys["num_kv_heads"] = None if model.kv_heads == model.num_heads else model.kv_heads
    keys["head_dim"] = None if model.attention_dim == model.model_dim else model.dim_per_head
    return keys


def written_form(model: ModelConfig) -> dict[str, Any]:
    """The keys with every size given."""
    sizes = {"mlp_dim": model.hidden_dim, "num_kv_heads": model.kv_heads, "head_dim": model.dim_per_head}
    return {**asdict(model), **sizes}


def nearest(forms: Mapping[str, Mapping[str, tuple[Any, ...]]], own: Mapping[str, Any], what: str, first: str) -> str:
    """The first form that a model equals, by the values of keys that each form allows.

    Args:
      own: the keys of the model.
      what: that there is none of otherwise, such as "format (huggingface) has no architecture".
      first: the form to take, of several.

    Raises:
      ConfigError: there is none; it names the keys in which the nearest one differs.
    """
    differences = {
        name: [key for key, values in allows.items() if own[key] not in values] for name, allows in forms.items()
    }
    found = min(differences, key=lambda name: (len(differences[name]), name != first))
    wanted = (f"model.{key} ({shown(own[key])}) must be {shown(forms[found][key][0])}" for key in differences[found])
    if differences[found]:
        raise ConfigError(f"{what} for this model; the nearest is {found}: {'; '.join(wanted)}")
    return found


def num_rows(model: ModelConfig, weights: Mapping[str, Any], form: str) -> int:
    """Rows of the embedding tables of a model that is to be written.

    Raises:
      ConfigError: its weights are not those of the GPT of section `model`.
    """
    rows = len(weights["token_embedding"]) if "token_embedding" in weights else 0
    for name in sorted({*weights} ^ {*weight_shapes(model, rows)}):
        raise ConfigError(f"format ({form}) is for the GPT of section model: only one of it and the run has {name}")
    return rows

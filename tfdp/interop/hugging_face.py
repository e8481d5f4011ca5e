"""A model in a Hugging Face folder: read as the weights of a GPT, and written from them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfdp.config.sections import ModelConfig
from tfdp.data import strict_json
from tfdp.interop import architectures
from tfdp.interop.architectures import ARCHITECTURES
from tfdp.interop.model_forms import num_rows, typed_keys
from tfdp.interop.tensor_folder import TensorFolder, write_tensors
from tfdp.interop.tensor_names import origins, without_aliases
from tfdp.models.dimensions import weight_shapes
from tfdp.system.exits import ConfigError
from tfdp.system.lazy import Lazy
from tfdp.system.messages import one_line, shown

CONFIG_FILE = "config.json"
_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # of old files: constants, not weights


def is_folder(path: Path) -> bool:
    """Whether a folder is one of Hugging Face's, by its config.json."""
    try:
        content: Any = strict_json.parse((path / CONFIG_FILE).read_bytes())
        return "model_type" in content
    except (OSError, ValueError, TypeError):
        return False


def model_type_of(path: Path) -> str | None:
    """The architecture that the config.json of a folder names; None where there is none."""
    content: Any = strict_json.parse((path / CONFIG_FILE).read_bytes()) if is_folder(path) else {}
    return content.get("model_type")


@dataclass(frozen=True)
class HuggingFaceModel:
    """A model of a folder, whose weights are read when they are asked for.

    Attributes:
      folder: with config.json and safetensors.
      where: what messages blame.
      keys: of section `model`.
    """

    folder: Path
    where: str
    model_type: str
    keys: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path, key: str) -> "HuggingFaceModel":
        """Reads config.json. Raises `ConfigError` for a folder without, or one that is not exactly understood."""
        where = f"{key} ({shown(folder)})"
        try:
            config = strict_json.parse((folder / CONFIG_FILE).read_bytes())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or one_line(str(error))
            raise ConfigError(f"{where} must hold a {CONFIG_FILE}: {reason}") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{where} must hold a {CONFIG_FILE} that is an object")
        keys = typed_keys(lambda: architectures.model_keys(config, where), where, CONFIG_FILE)
        return cls(folder, where, str(config.get("model_type")), keys)

    @property
    def tokenizer(self) -> str:
        """As `data.tokenizer` names the tokenizer of the folder."""
        return f"huggingface:{self.folder}"

    @property
    def files(self) -> list[Path]:
        """That hold the weights."""
        return sorted(self.folder.glob("*.safetensors"))

    def weights(self, model: ModelConfig, vocab_size: int) -> Mapping[str, np.ndarray]:
        """The weights of a GPT by name, float32, each read when it is asked for.

        Raises:
          ConfigError: a tensor is missing, has another shape, or is one that the model has no place for.
        """
        tensors = TensorFolder(self.folder, self.where)
        stored = without_aliases(dict.fromkeys(tensors.names))
        wanted = origins(ARCHITECTURES[self.model_type], model)
        shapes = weight_shapes(model, vocab_size)
        for name, origin in wanted.items():
            for theirs, shape in zip(origin.names, origin.shapes(shapes[name]), strict=True):
                if theirs not in stored:
                    raise ConfigError(f"{self.where} must hold the tensor {theirs}")
                found = tensors.shape(stored[theirs])
                if found != shape:
                    raise ConfigError(f"{self.where} must hold {theirs} of shape {list(shape)}, but has {list(found)}")
        used = {theirs for origin in wanted.values() for theirs in origin.names}
        aliases = {"lm_head.weight"} if model.tie_embeddings else set()  # the same table under a second name
        for theirs in stored:
            if theirs not in used | aliases and not theirs.endswith(_BUFFERS):
                raise ConfigError(
                    f"{self.where} holds a tensor that its architecture has no place for: {shown(theirs)}"
                )

        def read(name: str) -> np.ndarray:
            return wanted[name].join([tensors.read(stored[theirs]) for theirs in wanted[name].names])

        return Lazy(wanted, read)


def write_model(
    folder: Path,
    model: ModelConfig,
    weights: Mapping[str, np.ndarray],
    end_of_text: int,
    preferred: str | None = None,
    dtype: str = "float32",
    most_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json, generation_config.json and the tensors into an empty folder.

    Args:
      weights: of the GPT, by name.
      end_of_text: its id.
      preferred: the architecture, of several that fit.
      dtype: of the tensors.
      most_bytes: of a file of tensors.

    Raises:
      ConfigError: no architecture equals the model.
    """
    architecture = architectures.architecture_of(model, preferred)
    vocab_size = num_rows(model, weights, "huggingface")
    config = architectures.config_json(model, architecture, vocab_size, end_of_text, dtype)
    generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    for name, content in ((CONFIG_FILE, config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = (
        tensor
        for name, origin in origins(architecture, model).items()
        for tensor in origin.split(weights[name] if name in weights else np.ones(origin.widths, np.float32))
    )
    write_tensors(folder, tensors, dtype, most_bytes)

"""A model in a preset folder of KerasHub: read as the weights of a GPT, and written from them.

A preset is `config.json` (the backbone), `model.weights.h5`, and what makes a text: `tokenizer.json`,
`preprocessor.json`, `assets/`. It is read without KerasHub and without TensorFlow, and written by KerasHub itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfdp.config.sections import ModelConfig
from tfdp.data import strict_json
from tfdp.data.tokenizers.tokenizer import Tokenizer
from tfdp.interop import keras_hub_backbones, keras_hub_tokenizer
from tfdp.interop.keras_hub_backbones import BACKBONES, Backbone
from tfdp.interop.keras_hub_weights import places
from tfdp.interop.model_forms import num_rows, typed_keys
from tfdp.system.exits import ConfigError
from tfdp.system.lazy import Lazy
from tfdp.system.messages import one_line, shown

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.weights.h5", "model.weights.json"
_SHARDS = "model_*.weights.h5"  # where a preset is larger than 10 GB


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------


def is_folder(path: Path) -> bool:
    """Whether a folder is a preset of KerasHub, by its config.json."""
    try:
        content: Any = strict_json.parse((path / CONFIG_FILE).read_bytes())
        return "registered_name" in content
    except (OSError, ValueError, TypeError):
        return False


@dataclass(frozen=True)
class KerasHubModel:
    """A model of a preset, whose weights are read when they are asked for.

    Attributes:
      folder: with config.json and model.weights.h5.
      where: what messages blame.
      backbone: its class.
      keys: of section `model`. Most backbones know no longest text: context_length is what the preprocessor keeps.
    """

    folder: Path
    where: str
    backbone: Backbone
    keys: Mapping[str, Any]
    model_type = None  # of Hugging Face

    @classmethod
    def open(cls, folder: Path, key: str) -> "KerasHubModel":
        """Reads config.json. Raises `ConfigError` for a folder without, or one that is not exactly understood."""
        where = f"{key} ({shown(folder)})"
        try:
            content: Any = strict_json.parse((folder / CONFIG_FILE).read_bytes())
            name, config = str(content["registered_name"]), dict(content["config"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = getattr(error, "strerror", None) or one_line(str(error))
            raise ConfigError(f"{where} must hold the {CONFIG_FILE} of a KerasHub preset: {reason}") from None
        package, _, kind = name.rpartition(">")
        backbone = BACKBONES.get(kind.removesuffix("Backbone"))
        if backbone is None or package not in ("keras_hub", "keras_nlp"):
            known = ", ".join(f"{each}Backbone" for each in BACKBONES)
            raise ConfigError(f"{where} must be a backbone that tfdp reads ({known}), but is {shown(name)}")
        _check_dtype(config.get("dtype"), where)
        longest = keras_hub_tokenizer.sequence_length(folder, where)
        keys = typed_keys(lambda: keras_hub_backbones.model_keys(backbone, config, longest, where), where, CONFIG_FILE)
        return cls(folder, where, backbone, keys)

    @property
    def tokenizer(self) -> str:
        """As `data.tokenizer` names the tokenizer of the preset. Raises `ConfigError` for one that is not read."""
        return keras_hub_tokenizer.name_of(self.folder, self.where)

    @property
    def files(self) -> list[Path]:
        """That hold the weights."""
        shards = sorted(self.folder.glob(_SHARDS)) if (self.folder / INDEX_FILE).is_file() else []
        return shards or [self.folder / WEIGHTS_FILE]

    def weights(self, model: ModelConfig, vocab_size: int) -> Mapping[str, np.ndarray]:
        """The weights of a GPT by name, float32, each read when it is asked for.

        Raises:
          ConfigError: a tensor is missing, has another shape, or is one that the model has no place for.
        """
        tensors = _Tensors(self.files, self.where)
        wanted = places(self.backbone, model, vocab_size)
        for place in wanted.values():
            for address, shape in zip(place.addresses, place.shapes, strict=True):
                found = tensors.shapes.get(address)
                if found is None:
                    raise ConfigError(f"{self.where} must hold {address} in {WEIGHTS_FILE}")
                if found != shape:
                    raise ConfigError(f"{self.where} must hold {address} of shape {list(shape)}, but has {list(found)}")
        used = {address for place in wanted.values() for address in place.addresses}
        for address in tensors.shapes:
            if address not in used and "seed_generator" not in address:
                raise ConfigError(f"{self.where} holds a tensor that its backbone has no place for: {shown(address)}")
        return Lazy(wanted, lambda name: wanted[name].join([tensors.read(each) for each in wanted[name].addresses]))


def _check_dtype(policy: Any, where: str) -> None:
    """Refuses quantised weights, which say so in their policy."""
    name = policy.get("config", {}).get("name") if isinstance(policy, dict) else policy
    plain = ("float32", "bfloat16", "float16")
    if name not in (None, *plain, *(f"mixed_{each}" for each in plain)):
        raise ConfigError(f"{where} must hold weights in {', '.join(plain)}, but has the dtype policy {shown(name)}")


class _Tensors:
    """The tensors of HDF5 files, by address; those that lie in other files are refused."""

    def __init__(self, files: list[Path], where: str) -> None:
        import h5py

        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for path in files:
            try:
                with h5py.File(path, "r") as file:
                    file.visititems(lambda address, each, path=path: self._note(address, each, path, where))
            except (OSError, RuntimeError, KeyError) as error:
                reason = one_line(" ".join(str(error).split())) if path.is_file() else "no such file"
                raise ConfigError(f"{where} must hold a whole {path.name}: {reason}") from None

    def _note(self, address: str, item: Any, path: Path, where: str) -> None:
        import h5py

        if not isinstance(item, h5py.Dataset):
            return
        if item.external or item.is_virtual:
            raise ConfigError(f"{where} must hold its tensors itself, but {shown(address)} names other files")
        kind = item.attrs.get("dtype", item.dtype.name)
        if kind not in ("float32", "float16", "float64", "bfloat16") and "seed_generator" not in address:
            raise ConfigError(f"{where} must hold numbers in floating point, but {shown(address)} is in {shown(kind)}")
        self.shapes[address], self._files[address] = item.shape, path

    def read(self, address: str) -> np.ndarray:
        """A tensor as float32."""
        import h5py

        with h5py.File(self._files[address], "r") as file:
            stored = np.asarray(file[address][()])
            if file[address].attrs.get("dtype") == "bfloat16":  # the upper half of a float32
                return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32, copy=False)


# ---------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------


def write_preset(folder: Path, model: ModelConfig, weights: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> None:
    """Writes a folder that `keras_hub.models.CausalLM.from_preset` reads and generates text from.

    KerasHub writes it with weights of its own, which are then written over: so one table of addresses serves both
    directions, and every tensor of the file must be in it.

    Args:
      folder: an empty one.
      weights: of the GPT, by name, float32.
      tokenizer: its own, whose ids the preset must give.

    Raises:
      ConfigError: no backbone or no tokenizer of KerasHub equals these.
    """
    import h5py

    backbone = keras_hub_backbones.backbone_of(model)
    keras_hub_tokenizer.check(tokenizer)
    vocab_size = num_rows(model, weights, "keras_hub")
    _make_task(backbone, model, vocab_size, tokenizer).save_to_preset(str(folder), max_shard_size=None)
    wanted = places(backbone, model, vocab_size)
    with h5py.File(folder / WEIGHTS_FILE, "r+") as file:
        rest: set[str] = set()
        file.visititems(lambda address, each: rest.add(address) if isinstance(each, h5py.Dataset) else None)
        for name, place in wanted.items():
            weight = weights[name] if name in weights else np.ones(place.widths, np.float32)  # QK-norm without gains
            for address, tensor in place.split(weight):
                file[address].write_direct(np.ascontiguousarray(tensor, np.float32))
                rest.remove(address)
        assert all("seed_generator" in address for address in rest), rest
    keras_hub_tokenizer.write_own(folder, tokenizer)


def _make_task(backbone: Backbone, model: ModelConfig, vocab_size: int, tokenizer: Tokenizer) -> Any:
    """The model and its preprocessor as KerasHub's objects, with random weights."""
    import keras_hub

    classes = {each: getattr(keras_hub.models, f"{backbone.name}{each}") for each in ("Backbone", "CausalLM")}
    arguments = keras_hub_backbones.backbone_config(model, backbone, vocab_size)
    made = classes["Backbone"](**arguments)
    config = made.get_config() | {key: arguments[key] for key in arguments if key == "tie_word_embeddings"}
    made.get_config = lambda: dict(config)  # a Llama's lacks whether its embeddings are tied
    preprocessor = getattr(keras_hub.models, f"{backbone.name}CausalLMPreprocessor")(
        tokenizer=keras_hub_tokenizer.make_tokenizer(tokenizer), sequence_length=model.context_length
    )
    return classes["CausalLM"](backbone=made, preprocessor=preprocessor)

"""Low-rank adapters in the folders of the library PEFT: `adapter_config.json` and `adapter_model.safetensors`.

PEFT keeps an adapter for each of its modules. Queries, keys and values are one module in GPT-2 and three elsewhere;
here they have adapters of their own. Three of rank r are written as one of rank 3 r, whose B is zero outside three
blocks.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tfdp.config.sections import LoraTarget, ModelConfig
from tfdp.data import strict_json
from tfdp.data.inputs import path_of
from tfdp.interop import architectures
from tfdp.interop.architectures import ARCHITECTURES
from tfdp.interop.hugging_face import HuggingFaceModel
from tfdp.interop.tensor_folder import TensorFolder, metadata_of, save_tensors
from tfdp.interop.tensor_names import origins
from tfdp.models import lora
from tfdp.system.exits import ConfigError
from tfdp.system.lazy import Lazy
from tfdp.system.messages import one_line, shown
from tfdp.training.weights import digests_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_BASE_DIGEST, _TARGETS = "tfdp_base_sha256", "tfdp_lora_targets"  # in the metadata of the tensors
_PREFIX = "base_model.model."
_PLAIN: dict[
    str, tuple[Any, ...]
] = {  # keys of adapter_config.json that change the mathematics, and the values that do not
    "alora_invocation_tokens": (None,),
    "bias": ("none",),
    "exclude_modules": (None, []),
    "init_lora_weights": (True, False, None, "gaussian"),  # others change the base
    "layer_replication": (None, []),
    "layers_pattern": (None, []),
    "layers_to_transform": (None, []),
    "lora_bias": (False, None),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "peft_type": ("LORA",),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_bdlora": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
}


# Keys that are read, or that tell no logit apart.
_READ = {
    "alpha_pattern",
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}


@dataclass(frozen=True)
class Module:
    """A module of a Hugging Face model with an adapter, and what it is here.

    Attributes:
      name: such as "model.layers.0.self_attn.q_proj".
      layer: ours, such as "block_0/attention/query_key_value".
      widths: of the outputs of each target that it covers, in order.
    """

    name: str
    layer: str
    widths: Mapping[str, int]


def modules(model: ModelConfig, model_type: str) -> list[Module]:
    """The modules of an architecture that the adapters of a model belong to."""
    found, wanted = [], origins(ARCHITECTURES[model_type], model)
    for index in range(model.num_layers):
        for layer in lora.adapted_layers(model).values():
            path = f"block_{index}/{layer.name}"
            names = [name.removesuffix(".weight") for name in wanted[f"{path}/kernel"].names]
            if len(names) == len(layer.widths):
                found += [
                    Module(name, path, {target: layer.widths[target]})
                    for name, target in zip(names, layer.widths, strict=True)
                    if target in layer.targets
                ]
            else:  # one module for all
                found.append(Module(names[0], path, layer.widths))
    return found


# ---------------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------------


def write_adapter(
    folder: Path, model: ModelConfig, weights: Mapping[str, np.ndarray], base: str | None, preferred: str | None = None
) -> None:
    """Writes the adapters of a model into an empty folder, float32.

    Args:
      weights: of the model by name, those of its base among them.
      base: the folder of the base model, as PEFT should look for it.
      preferred: the architecture of the base, of several that fit.

    Raises:
      ConfigError: no architecture equals the base.
    """
    model_type = architectures.architecture_of(model, preferred).model_type
    rank, alpha = int(model.lora_rank or 0), model.adapter_alpha
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module in modules(model, model_type):
        a, b = _joined(module, weights, model.adapted_targets)
        tensors[f"{_PREFIX}{module.name}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{_PREFIX}{module.name}.lora_B.weight"] = np.ascontiguousarray(b.T)
        ranks[_short(module.name)] = a.shape[1]
    wider = {name: each for name, each in ranks.items() if each != rank}
    stretch = (lambda ratio: math.sqrt(ratio)) if model.lora_rank_stabilised else (lambda ratio: ratio)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "lora_dropout": model.lora_dropout,
        "use_rslora": model.lora_rank_stabilised,
        "rank_pattern": wider,
        "alpha_pattern": {name: alpha * stretch(each / rank) for name, each in wider.items()},
        "bias": "none",
        "fan_in_fan_out": model_type == "gpt2",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    metadata = {_TARGETS: ",".join(model.adapted_targets), _BASE_DIGEST: _base_digest(weights)}
    save_tensors(tensors, folder / WEIGHTS_FILE, metadata)


def _joined(
    module: Module, weights: Mapping[str, np.ndarray], targets: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The A (inputs, rank) and B (rank, outputs) of a module: those of its targets, as blocks."""
    chosen = [target for target in module.widths if target in targets]
    each_a = [weights[f"{module.layer}/{lora.FOLDER}/{target}_a"] for target in chosen]
    rank = each_a[0].shape[1]
    b = np.zeros((rank * len(chosen), sum(module.widths.values())), np.float32)
    for target, (rows, columns) in _blocks(module, chosen, rank).items():
        b[rows, columns] = weights[f"{module.layer}/{lora.FOLDER}/{target}_b"]
    return np.concatenate(each_a, axis=1), b


def _blocks(module: Module, chosen: list[str], rank: int) -> dict[str, tuple[slice, slice]]:
    """Rows and columns of each chosen target in the B of a module."""
    blocks: dict[str, tuple[slice, slice]] = {}
    start = 0
    for target, width in module.widths.items():
        if target in chosen:
            first = rank * len(blocks)
            blocks[target] = (slice(first, first + rank), slice(start, start + width))
        start += width
    return blocks


def _short(name: str) -> str:
    """A module in all layers, as `target_modules` names it: "attn.c_proj", not that of the MLP too."""
    return ".".join(name.split(".")[-2:])


def _base_digest(weights: Mapping[str, np.ndarray]) -> str:
    """The digest of the weights below the adapters, each read once."""
    names = (name for name in weights if not lora.is_adapter(name))
    return digests_of(Lazy(names, lambda name: weights[name]), {})["weights_sha256"]


# ---------------------------------------------------------------------------------------------------
# In
# ---------------------------------------------------------------------------------------------------


def is_folder(path: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (path / CONFIG_FILE).is_file()


@dataclass(frozen=True)
class PeftModel:
    """An adapter of a folder, and the model that it is for.

    Attributes:
      folder: of the adapter.
      where: what messages blame.
      keys: of section `model`, those of adapters among them.
      base: whose folder `adapter_config.json` names, from here or from the folder of the adapter.
    """

    folder: Path
    where: str
    keys: Mapping[str, Any]
    base: HuggingFaceModel

    @classmethod
    def open(cls, folder: Path, key: str) -> "PeftModel":
        """Reads adapter_config.json. Raises `ConfigError` for one that is not understood, or without its base."""
        where = f"{key} ({shown(folder)})"
        try:
            content: Any = strict_json.parse((folder / CONFIG_FILE).read_bytes())
            _refuse_unknown(content, where)
            _refuse_patterns(content, folder, where)
            base = _open_base(folder, where)
            rank, targets = int(content["r"]), _targets(content, base, folder)
            keys = {
                **base.keys,
                "lora_rank": rank,
                "lora_alpha": float(content.get("lora_alpha", 8)),
                "lora_rank_stabilised": bool(content.get("use_rslora", False)),
                "lora_targets": targets,
            }
            ModelConfig(**keys)
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            if isinstance(error, ConfigError) and str(error).startswith(where):
                raise
            raise ConfigError(f"{where} must hold a whole {CONFIG_FILE}: {one_line(str(error))}") from None
        return cls(folder, where, keys, base)

    @property
    def model_type(self) -> str:
        return self.base.model_type

    @property
    def tokenizer(self) -> str:
        """As `data.tokenizer` names the tokenizer: the adapter's own, or that of its base."""
        own = (self.folder / "tokenizer.json").is_file()
        return f"huggingface:{self.folder}" if own else self.base.tokenizer

    @property
    def files(self) -> list[Path]:
        """That hold the weights."""
        return [*self.base.files, self.folder / WEIGHTS_FILE]

    def weights(self, model: ModelConfig, vocab_size: int) -> Mapping[str, np.ndarray]:
        """The weights of the base, each read when it is asked for, and of the adapters.

        Raises:
          ConfigError: a tensor is missing, has another shape or no place, or the adapter is for another base.
        """
        base = self.base.weights(model, vocab_size)
        tensors = TensorFolder(self.folder, self.where, WEIGHTS_FILE)
        wanted = metadata_of(self.folder / WEIGHTS_FILE).get(_BASE_DIGEST)
        if wanted is not None and wanted != _base_digest(base):
            raise ConfigError(f"{self.where} is an adapter for another base than {self.base.folder}: digests differ")
        used: set[str] = set()
        adapters: dict[str, np.ndarray] = {}
        shapes = lora.adapter_shapes(model)
        for module in modules(model, self.base.model_type):
            pair = [f"{_PREFIX}{module.name}.lora_{each}.weight" for each in "AB"]
            used.update(pair)
            for name in pair:
                if name not in tensors.names:
                    raise ConfigError(f"{self.where}: {WEIGHTS_FILE} must hold the tensor {name}")
            adapters |= self._split(module, tensors.read(pair[0]).T, tensors.read(pair[1]).T, model)
        for name in tensors.names:
            if name not in used:
                raise ConfigError(f"{self.where}: {WEIGHTS_FILE} holds a tensor without a place: {shown(name)}")
        for name, shape in shapes.items():
            found = adapters[name].shape
            if found != shape:
                raise ConfigError(f"{self.where} must have {name} of shape {list(shape)}, but has {list(found)}")
        return Lazy([*base, *adapters], lambda name: adapters[name] if name in adapters else base[name])

    def _split(self, module: Module, a: np.ndarray, b: np.ndarray, model: ModelConfig) -> dict[str, np.ndarray]:
        """The adapter of each target of a module; of one that all share, each target gets A and its part of B."""
        chosen = [target for target in module.widths if target in model.adapted_targets]
        rank = int(model.lora_rank or 0)
        prefix = f"{module.layer}/{lora.FOLDER}"
        found: dict[str, np.ndarray] = {}
        is_ours = len(module.widths) > 1 and a.shape[1] == rank * len(chosen) and _own_targets(self.folder)
        blocks = _blocks(module, chosen, rank)
        for target, (rows, columns) in blocks.items():
            own = rows if is_ours else slice(0, None)
            found[f"{prefix}/{target}_a"] = np.ascontiguousarray(a[:, own])
            found[f"{prefix}/{target}_b"] = np.ascontiguousarray(b[own, columns])
        return found


def _refuse_unknown(content: Any, where: str) -> None:
    """Refuses what is no plain LoRA: known keys with other values, and keys that nobody here knows."""
    for key, value in content.items():
        allowed = _PLAIN.get(key)
        is_off = value is None or value is False or value in ([], {})
        is_plain = key in _READ or (is_off if allowed is None else any(_is_same(value, each) for each in allowed))
        if not is_plain:
            raise ConfigError(f"{where} must be a plain LoRA adapter: {key} is {shown(json.dumps(value))}")
    for key, kind in (("r", int), ("lora_alpha", int | float), ("use_rslora", bool)):
        value = content.get(key, {"r": None, "lora_alpha": 8, "use_rslora": False}[key])
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise ConfigError(f"{where} must have a number or a truth value as {key}, but has {json.dumps(value)}")


def _is_same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


def _refuse_patterns(content: Any, folder: Path, where: str) -> None:
    """Refuses a rank or a scale of single modules: the scale of an adapter shows in no tensor."""
    for key in ("rank_pattern", "alpha_pattern"):
        if content.get(key) and not _own_targets(folder):  # tfdp writes them for what is one module there alone
            what, found = key.partition("_")[0], shown(json.dumps(content[key]))
            raise ConfigError(f"{where} must have one {what} for all modules: its {key} is {found}")


def base_name(folder: Path) -> str | None:
    """The base that the configuration of an adapter names, which need not be there; None where it names none."""
    try:
        content: Any = strict_json.parse((folder / CONFIG_FILE).read_bytes())
        name = content.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return name if isinstance(name, str) and name else None


def _open_base(folder: Path, where: str) -> HuggingFaceModel:
    if name := base_name(folder):
        for path in (path_of(name), folder / name):
            if (path / "config.json").is_file():
                return HuggingFaceModel.open(path, f"{where}: its base")
    rule = "must be a folder with a model: write its path into base_model_name_or_path"
    raise ConfigError(f"{where}: its base ({shown(name)}) {rule}")


def _targets(content: Any, base: HuggingFaceModel, folder: Path) -> tuple[str, ...]:
    """The targets here of an adapter: by its tensors, or as an export of tfdp says."""
    if own := _own_targets(folder):
        return own
    names = TensorFolder(folder, CONFIG_FILE, WEIGHTS_FILE).names
    every = ModelConfig(**{**base.keys, "lora_rank": int(content["r"])})
    covered = {
        target
        for module in modules(every, base.model_type)
        if f"{_PREFIX}{module.name}.lora_A.weight" in names
        for target in module.widths
    }
    return tuple(target for target in get_args(LoraTarget) if target in covered)


def _own_targets(folder: Path) -> tuple[str, ...]:
    own = metadata_of(folder / WEIGHTS_FILE).get(_TARGETS, "")
    return tuple(own.split(",")) if own else ()

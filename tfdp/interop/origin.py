"""What a run starts from: a folder with a model that it takes over (`model.init_from`).

The folder is Hugging Face's, PEFT's, KerasHub's, or the directory of a run of tfdp. Its shape becomes the run's: the
keys of section `model` come from there, and so does the tokenizer unless another is named.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from tfdp.config import options, source_syntax
from tfdp.config.parsing import known_keys
from tfdp.config.run_config import config_records, recorded_values, standard_defaults
from tfdp.config.sections import DataConfig, ModelConfig
from tfdp.data.inputs import path_of
from tfdp.data.shards import open_tokenizer_of
from tfdp.data.sources import TOKENS
from tfdp.data.tokenizers.tokenizer import make_tokenizer
from tfdp.interop import hugging_face, keras_hub, peft
from tfdp.interop.hugging_face import HuggingFaceModel
from tfdp.interop.keras_hub import KerasHubModel
from tfdp.interop.peft import PeftModel
from tfdp.system.exits import ConfigError, require
from tfdp.system.lazy import Lazy
from tfdp.system.messages import shown
from tfdp.training.checkpoint import CheckpointFolder, evaluated_file

INIT_FROM = "model.init_from"
# keys that no folder decides about
_OWN_CHOICE = ("init_from", "prompt_attention", "dropout", "init_stddev", "zero_init", "lora_dropout")
_ADAPTER_KEYS = ("lora_rank", "lora_alpha", "lora_rank_stabilised", "lora_targets")  # that one with adapters decides


@dataclass(frozen=True)
class RunModel:
    """The best checkpoint of a run of tfdp, as an origin."""

    folder: Path
    keys: Mapping[str, Any]
    model_type = None

    @classmethod
    def open(cls, folder: Path) -> "RunModel":
        content = {**standard_defaults(), **recorded_values(folder)}  # an earlier run lacks later keys
        keys = {key.removeprefix("model."): value for key, value in content.items() if key.startswith("model.")}
        kinds = known_keys(ModelConfig)
        for key in keys:
            rule = f"must be the run of a GPT, but has the key model.{key}"
            require(key in kinds, INIT_FROM, folder, rule)
        found = {key: options.read(f"model.{key}", kinds[key], keys[key]) for key in keys}
        if found.get("lora_rank") is None:  # the next run may have adapters
            found = {key: value for key, value in found.items() if key not in _ADAPTER_KEYS}
        return cls(folder, found)

    @property
    def tokenizer(self) -> str:
        return f"bpe:{self.folder / 'tokenizer'}"  # of whatever kind: the folder says

    @property
    def files(self) -> list[Path]:
        """That hold the weights, those that no step changes among them."""
        frozen = sorted((self.folder / "checkpoints").glob("frozen_*.safetensors"))
        return [evaluated_file(self._checkpoints.path(self._step)), *frozen]

    def weights(self, model: ModelConfig, vocab_size: int) -> Mapping[str, np.ndarray]:
        """The weights of the model by name. Raises `ConfigError` where there is no whole checkpoint."""
        saved = self._checkpoints.load(self._step)
        return {**saved.evaluated, **saved.frozen}

    @property
    def _checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.folder / "checkpoints")

    @property
    def _step(self) -> int:
        step = self._checkpoints.best_or_newest_step()
        if step is None:
            raise ConfigError(f"{INIT_FROM} ({shown(self.folder)}) must hold a checkpoint: there is none yet")
        return step


Origin = HuggingFaceModel | PeftModel | KerasHubModel | RunModel


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds a model of another library."""
    return not config_records(folder) and any(library.is_folder(folder) for library in (peft, keras_hub, hugging_face))


def open_origin(name: str, key: str = INIT_FROM) -> Origin:
    """The model of a folder, whose weights are not read yet.

    Args:
      key: the configuration key that names it.

    Raises:
      ConfigError: no such folder, or one that holds no model that is read here.
    """
    folder = path_of(name)
    if config_records(folder):
        return RunModel.open(folder)
    if peft.is_folder(folder):
        return PeftModel.open(folder, key)
    if keras_hub.is_folder(folder):
        return KerasHubModel.open(folder, key)
    if (folder / hugging_face.CONFIG_FILE).is_file():
        return HuggingFaceModel.open(folder, key)
    raise ConfigError(
        f"{key} ({shown(folder)}) must be a folder of Hugging Face or KerasHub, with a {hugging_face.CONFIG_FILE}, or "
        f"the directory of a run"
    )


def base_of(name: str) -> str:
    """The folder of the model below the adapters that a folder may hold; the folder itself where it holds none."""
    folder = path_of(name)
    if peft.is_folder(folder):
        return peft.base_name(folder) or name
    content = recorded_values(folder)
    below = content.get(INIT_FROM)
    return base_of(below) if content.get("model.lora_rank") is not None and below is not None else name


def with_origin_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration, with those that the folder of `model.init_from` decides about.

    A shorter context than the folder's may be chosen, unless its positions are learned, and a larger vocabulary. A run
    that is resumed has all keys in its record, and its weights in its checkpoints: the folder may be gone.

    Args:
      values: by dotted key, without defaults.

    Raises:
      ConfigError: a key was given another value than the folder has.
    """
    found, name = dict(values), values.get(INIT_FROM)
    run_dir = values.get("run_dir")
    if has_checkpoints(run_dir):
        _require_same_origin(Path(run_dir), name)
        return found
    if name is None:
        rank = values.get("model.lora_rank")
        require(rank is None, "model.lora_rank", rank, f"needs {INIT_FROM}, the model that is adapted")
        return found
    origin = open_origin(name)
    for own, value in origin.keys.items():
        key = f"model.{own}"
        if own in _OWN_CHOICE:
            continue
        given = found.setdefault(key, value)
        is_shorter = own == "context_length" and origin.keys["position"] != "learned" and given <= value
        is_larger = own == "vocab_size" and given is not None and given >= (value or 0)
        if given != value and not is_shorter and not is_larger:
            at_most, at_least = own == "context_length" and given > value, own == "vocab_size" and value is not None
            rule = f"at {'most' if at_most else 'least'} {value}" if at_most or at_least else shown(value)
            raise ConfigError(
                f"{key} ({shown(given)}) must be {rule}, as {INIT_FROM} ({shown(path_of(name))}) has it: leave it out"
            )
    if not isinstance(origin, RunModel):  # damage and other shapes show now, before TensorFlow is loaded
        origin.weights(ModelConfig(**origin.keys), origin.keys["vocab_size"])
    if found.get("data.tokenizer", "auto") == "auto":
        sources = source_syntax.parse(values.get("data.source", DataConfig().source))
        shards = [source for source, _ in sources if source.startswith(TOKENS)]
        if shards:
            _require_tokenizer(shards, origin)
        else:
            found["data.tokenizer"] = origin.tokenizer
    return found


def _require_same_origin(run_dir: Path, name: str | None) -> None:
    """Raises `ConfigError` where a run that has weights of its own is to start from another folder now."""
    begun = recorded_values(run_dir).get(INIT_FROM)
    if begun != name:
        rule = f"must be {shown(begun)}, from which this run started: name another run_dir"
        raise ConfigError(f"{INIT_FROM} ({shown(name)}) {rule}")


def _require_tokenizer(shards: Sequence[str], origin: Origin) -> None:
    """Raises `ConfigError` where token shards were made by another tokenizer than that of the model."""
    wanted = make_tokenizer(origin.tokenizer, INIT_FROM)
    for name in shards:
        found = open_tokenizer_of(path_of(name.removeprefix(TOKENS)), f"data.source: {TOKENS.rstrip(':')}")
        if found.fingerprint != wanted.fingerprint:
            raise ConfigError(
                f"data.source ({shown(name)}) must hold tokens of the tokenizer of {INIT_FROM}, but has those of "
                f"{found.name}: prepare it again with --tokenizer {origin.tokenizer}"
            )


def has_checkpoints(run_dir: str | None) -> TypeGuard[str]:
    """Whether a run has weights of its own by now."""
    return run_dir is not None and bool(CheckpointFolder(Path(run_dir) / "checkpoints").steps())


def without_origin(config: Any) -> Any:
    """The configuration of a model whose weights come from a checkpoint, not from `model.init_from`."""
    is_named = getattr(config.model, "init_from", None) is not None
    return replace(config, model=replace(config.model, init_from=None)) if is_named else config


def given_weights(model: ModelConfig, vocab_size: int) -> Mapping[str, np.ndarray] | None:
    """The weights of `model.init_from`, read when they are asked for; None where nothing is named.

    Raises:
      ConfigError: there is no such folder, or a weight is missing or has another shape.
    """
    if model.init_from is None:
        return None
    origin = open_origin(model.init_from)
    own_size = origin.keys.get("vocab_size")
    weights = origin.weights(replace(model, vocab_size=own_size), vocab_size)
    asked = model.vocab_size
    if asked is None or asked == own_size:
        return weights
    return _widened(weights, asked) if asked > (own_size or len(weights["token_embedding"])) else weights


def _widened(weights: Mapping[str, np.ndarray], num_rows: int) -> Mapping[str, np.ndarray]:
    """Weights whose tables have more rows: the mean of the others, so that no new token starts out far more or less
    likely than they are."""

    def read(name: str) -> np.ndarray:
        weight = weights[name]
        if name not in ("token_embedding", "output_embedding"):
            return weight
        mean = weight.mean(axis=0, dtype=np.float64, keepdims=True).astype(np.float32)
        return np.concatenate([weight, mean.repeat(num_rows - len(weight), axis=0)])

    return Lazy(weights, read)


def digest_of(name: str) -> str:
    """The sha256 of the files that weights are read from: the same on all workers."""
    total = hashlib.sha256()
    for path in open_origin(name).files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()

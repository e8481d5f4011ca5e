"""Writes a trained model in the format of another library; the folder appears whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tfdp.config.sections import MOST, ModelConfig
from tfdp.data.inputs import path_of
from tfdp.inference.trained import TrainedModel
from tfdp.interop import hugging_face, keras_hub, origin, peft
from tfdp.interop.tokenizer_json import write_tokenizer
from tfdp.models import lora
from tfdp.system.exits import ConfigError, require, require_at_most
from tfdp.system.lazy import Lazy
from tfdp.system.messages import shown

if TYPE_CHECKING:  # folders of Hugging Face are written without TensorFlow
    from tfdp.models.gpt import GPT

LOADERS = {  # of each format
    "huggingface": 'transformers.AutoModelForCausalLM.from_pretrained("{}")',
    "peft": 'peft.AutoPeftModelForCausalLM.from_pretrained("{}")',
    "keras_hub": 'keras_hub.models.CausalLM.from_preset("{}")',
    "saved_model": 'tf.saved_model.load("{}")',
    "onnx": 'onnxruntime.InferenceSession("{}/model.onnx")',
}


@dataclass(frozen=True)
class ExportConfig:
    """What to write."""

    format: Literal["huggingface", "peft", "keras_hub", "saved_model", "onnx"] = "huggingface"
    """huggingface: a folder for transformers; peft: the adapters of a run with model.lora_rank; keras_hub: a preset for
    KerasHub; saved_model: graphs for TensorFlow alone, with the signatures score, logits and generate; onnx: the
    logits, by tf2onnx."""
    output: str | None = None
    """Folder to write; must be named, and must not exist or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the numbers of format huggingface; all but float32 round the weights."""
    merge: bool = False
    """Whether adapters are added to the weights, which every format but peft needs."""
    file_megabytes: int = 5000
    """With huggingface: most megabytes of a file of weights; a larger model is several files and an index."""

    def __post_init__(self) -> None:
        require(bool(self.output), "output", self.output, "must name a folder: try --output exported")
        require_at_most(self, file_megabytes=MOST)
        require(self.file_megabytes >= 1, "file_megabytes", self.file_megabytes, "must be at least 1: try 5000")
        rule = f"must be float32 with format {self.format}"
        require(self.dtype == "float32" or self.format == "huggingface", "dtype", self.dtype, rule)
        rule = "must be false with format peft, which has adapters alone"
        require(not self.merge or self.format != "peft", "merge", self.merge, rule)


def require_free(output: str) -> Path:
    """The folder of an export. Raises `ConfigError` where something is in the way."""
    path = Path(output)
    is_free = not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))
    require(is_free, "output", output, "must not exist, or be an empty folder: name a new one")
    require(path.name not in ("", ".."), "output", output, "must name a folder: try exported")
    return path


def export(trained: TrainedModel, config: ExportConfig, command: str) -> None:
    """Writes a model.

    Args:
      command: what was called, for the model card.

    Raises:
      ConfigError: the model cannot be written in this format, or the folder cannot be written.
    """
    output, model = require_free(str(config.output)), trained.config.model
    is_gpt = isinstance(model, ModelConfig)
    require(is_gpt, "format", config.format, "is for a run whose section model is that of the GPT")
    rule = "is for a model whose inputs see no later tokens: train it with --model.prompt_attention causal"
    require(model.prompt_attention == "causal", "format", config.format, rule)
    has_adapters = model.lora_rank is not None
    rule = "is for a run with model.lora_rank: try huggingface"
    require(has_adapters or config.format != "peft", "format", config.format, rule)
    rule = "has no place for the adapters of this run: try --merge true, or --format peft"
    require(config.merge or config.format == "peft" or not has_adapters, "format", config.format, rule)
    scratch = output.with_name(f".{output.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        scratch.mkdir(parents=True)
        _WRITERS[config.format](scratch, trained, config)
        (scratch / "README.md").write_text(_model_card(trained, config, command), encoding="utf-8")
        if output.exists():
            output.rmdir()
        os.rename(scratch, output)
    except OSError as error:
        raise ConfigError(
            f"output ({output}) must be a folder that can be written: {error.strerror or error}"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _plain(trained: TrainedModel) -> tuple[ModelConfig, Mapping[str, Any]]:
    """The model and its weights, adapters added to them."""
    model = trained.config.model
    return lora.merged_model(model), lora.merged(model, _all(trained))


def _all(trained: TrainedModel) -> Mapping[str, Any]:
    """All weights by name, read when they are asked for where they lie in a folder of another library."""
    own, frozen = trained.weights, trained.frozen
    return Lazy([*own, *frozen], lambda name: frozen[name] if name in frozen else own[name])


def _hugging_face(folder: Path, trained: TrainedModel, config: ExportConfig) -> None:
    model, weights = _plain(trained)
    end_of_text, most = trained.tokenizer.end_of_text, config.file_megabytes * 1_000_000
    hugging_face.write_model(folder, model, weights, end_of_text, trained.model_type, config.dtype, most)
    write_tokenizer(folder, trained.tokenizer, model.context_length)


def _peft(folder: Path, trained: TrainedModel, config: ExportConfig) -> None:
    model, weights = trained.config.model, _all(trained)
    base = None if trained.started_from is None else origin.base_of(trained.started_from)
    rule = "is for adapters on the folder of a Hugging Face model: try --format huggingface --merge true"
    is_folder = base is not None and hugging_face.is_folder(path_of(base))
    require(is_folder, "format", config.format, f"{rule}; the base of these is {shown(base)}")
    rows = hugging_face.HuggingFaceModel.open(path_of(str(base)), "base").keys["vocab_size"]
    rule = f"is for adapters on a base that did not grow, and {base} has {rows} tokens: try --format huggingface"
    require(rows == len(weights["token_embedding"]), "format", config.format, f"{rule} --merge true")
    peft.write_adapter(folder, model, weights, base, trained.model_type)
    write_tokenizer(folder, trained.tokenizer, model.context_length)


def _keras_hub(folder: Path, trained: TrainedModel, config: ExportConfig) -> None:
    keras_hub.write_preset(folder, *_plain(trained), trained.tokenizer)


def _saved_model(folder: Path, trained: TrainedModel, config: ExportConfig) -> None:
    from tfdp.interop.saved_model import write_saved_model

    gpt, tokenizer = _gpt(trained, trained.config.training.precision), trained.tokenizer
    write_saved_model(folder, gpt, tokenizer.end_of_text, tokenizer.vocab_size)


def _onnx(folder: Path, trained: TrainedModel, config: ExportConfig) -> None:
    from tfdp.interop.saved_model import write_onnx

    write_onnx(folder / "model.onnx", _gpt(trained, "float32"), trained.tokenizer.end_of_text)


def _gpt(trained: TrainedModel, precision: str) -> "GPT":
    from tfdp.models.gpt import GPT

    model, weights = _plain(trained)
    return GPT(model, trained.tokenizer.vocab_size, precision=precision, given=weights)


_WRITERS: Mapping[str, Callable[[Path, TrainedModel, ExportConfig], None]] = {
    "huggingface": _hugging_face,
    "peft": _peft,
    "keras_hub": _keras_hub,
    "saved_model": _saved_model,
    "onnx": _onnx,
}


def _model_card(trained: TrainedModel, config: ExportConfig, command: str) -> str:
    from tfdp.data.corpus import licence_of

    run, summary = trained.config, trained.summary
    licence = licence_of(run.data.source) if trained.corpus_sha256 else None
    rows = {
        "data": f"`{run.data.source}`, sha256 {trained.corpus_sha256[:16]}"
        if trained.corpus_sha256
        else "not recorded",
        "licence of the data": licence or "not known here",
        "started from": f"`{Path(trained.started_from).name}`" if trained.started_from else "random weights",
        "checkpoint": f"step {trained.step} of {run.training.steps}",
        "sequences seen": f"{summary['sequences_seen']:,}" if "sequences_seen" in summary else "not recorded",
        "validation loss": f"{summary['validation_loss']:.4f} nats per token" if "validation_loss" in summary else "-",
        "tokenizer": trained.tokenizer.name,
        "made by": f"`{command}`",
    }
    names = {"huggingface": "transformers", "keras_hub": "keras-hub", "saved_model": "tensorflow"}
    head = [
        "---",
        f"library_name: {names.get(config.format, config.format)}",
        "pipeline_tag: text-generation",
        "---",
        "",
    ]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join([*head, "# Model card", "", *table, ""])

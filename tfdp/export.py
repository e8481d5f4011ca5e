"""Writes a trained model in the format of another library: `python -m tfdp.export --run_dir DIR --output FOLDER`.

`--format huggingface` makes a folder that transformers loads without code of ours: `AutoModelForCausalLM` and
`AutoTokenizer`. `--format peft` writes the adapters alone, for PEFT. The folder appears whole or not at all.
"""

import os
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tfdp.config.parsing import load
from tfdp.config.sections import MOST, ModelConfig
from tfdp.system.exits import ConfigError, require, require_at_most, run_command


@dataclass(frozen=True)
class Config:
    """The export."""

    run_dir: str = "runs/latest"
    """Directory of the run, or a folder of Hugging Face."""
    checkpoint: str = "best"
    """Which checkpoint: best (by validation loss, or the metric of its task), newest, or a step."""
    format: Literal["huggingface", "peft"] = "huggingface"
    """huggingface: a folder for transformers (config.json, model.safetensors, tokenizer.json and a model card); peft:
    the adapters of a run with model.lora_rank."""
    output: str | None = None
    """Folder to write; must be named, and must not exist or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the numbers; all but float32 round the weights."""
    merge: bool = False
    """Whether adapters are added to the weights, which every format but peft needs."""
    file_megabytes: int = 5000
    """Most megabytes of a file of weights; a larger model is written as several files and an index."""

    def __post_init__(self) -> None:
        require(bool(self.output), "output", self.output, "must name a folder: try --output exported")
        require_at_most(self, file_megabytes=MOST)
        require(self.file_megabytes >= 1, "file_megabytes", self.file_megabytes, "must be at least 1: try 5000")


def main() -> None:
    description = "Write a trained model in the format of another library."
    config = load(Config, sys.argv[1:], "python -m tfdp.export", description)
    from tfdp.inference.trained import TrainedGPT

    output = Path(str(config.output))
    is_free = not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir()))
    require(is_free, "output", output, "must not exist, or be an empty folder: name a new one")
    trained = TrainedGPT.open(config.run_dir, config.checkpoint, "exported")
    is_gpt = isinstance(trained.config.model, ModelConfig)
    require(is_gpt, "run_dir", config.run_dir, "must be a run whose section model is that of the GPT to be exported")
    _check_adapters(trained, config)
    scratch = output.with_name(f".{output.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        scratch.mkdir(parents=True)
        _write(scratch, trained, config)
        if output.exists():
            output.rmdir()
        os.rename(scratch, output)
    except OSError as error:
        raise ConfigError(
            f"output ({output}) must be a folder that can be written: {error.strerror or error}"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"exported   {output}, step {trained.step} of {config.run_dir}")
    loader = {"huggingface": "transformers.AutoModelForCausalLM", "peft": "peft.AutoPeftModelForCausalLM"}
    print(f'next       {loader[config.format]}.from_pretrained("{output}")')


def _check_adapters(trained: Any, config: Config) -> None:
    has_adapters = trained.config.model.lora_rank is not None
    if config.format == "peft":
        require(has_adapters, "format", config.format, "is for a run with model.lora_rank: try huggingface")
        require(not config.merge, "merge", config.merge, "must be false with format peft, which has adapters alone")
        require(config.dtype == "float32", "dtype", config.dtype, "must be float32 with format peft")
    else:
        rule = "has no place for the adapters of this run: try --merge true, or --format peft"
        require(config.merge or not has_adapters, "format", config.format, rule)


def _write(folder: Path, trained: Any, config: Config) -> None:
    from tfdp.interop import hugging_face, origin, peft
    from tfdp.interop.tokenizer_json import write_tokenizer
    from tfdp.models import lora

    model, weights = trained.config.model, {**trained.weights, **trained.frozen}
    if config.format == "peft":
        base = None if trained.started_from is None else origin.base_of(trained.started_from)
        peft.write_adapter(folder, model, weights, base, trained.model_type)
    else:
        model, weights = lora.merged_model(model), lora.merged(model, weights)
        most = config.file_megabytes * 1_000_000
        end_of_text = trained.tokenizer.end_of_text
        hugging_face.write_model(folder, model, weights, end_of_text, trained.model_type, config.dtype, most)
    write_tokenizer(folder, trained.tokenizer, model.context_length)
    (folder / "README.md").write_text(_model_card(trained, config), encoding="utf-8")


def _model_card(trained: Any, config: Config) -> str:
    from tfdp.data.corpus import licence_of

    run, summary = trained.config, trained.summary
    licence = licence_of(run.data.source)
    rows = {
        "data": f"`{run.data.source}`, sha256 {trained.corpus_sha256[:16]}"
        if trained.corpus_sha256
        else "not recorded",
        "licence of the data": licence or "not known here",
        "checkpoint": f"step {trained.step} of {run.training.steps}",
        "sequences seen": f"{summary['sequences_seen']:,}" if "sequences_seen" in summary else "not recorded",
        "validation loss": f"{summary['validation_loss']:.4f} nats per token" if "validation_loss" in summary else "-",
        "tokenizer": trained.tokenizer.name,
        "made by": f"`python -m tfdp.export --run_dir {Path(config.run_dir).name} --checkpoint {config.checkpoint}`",
    }
    library = "peft" if config.format == "peft" else "transformers"
    head = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "---", "", "# Model card", ""]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join([*head, *table, ""])


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))

"""Writes a trained model in the format of another library: `python -m tfdp.export --run_dir DIR --output FOLDER`.

`--format huggingface` makes a folder that transformers loads without code of ours: `AutoModelForCausalLM` and
`AutoTokenizer`. The folder appears whole or not at all.
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
    format: Literal["huggingface"] = "huggingface"
    """huggingface: a folder for transformers (config.json, model.safetensors, tokenizer.json and a model card)."""
    output: str | None = None
    """Folder to write; must be named, and must not exist or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the numbers; all but float32 round the weights."""
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
    print(f'next       transformers.AutoModelForCausalLM.from_pretrained("{output}")')


def _write(folder: Path, trained: Any, config: Config) -> None:
    from tfdp.interop.hugging_face import write_model
    from tfdp.interop.tokenizer_json import write_tokenizer

    model, weights = trained.config.model, {**trained.weights, **trained.frozen}
    origin = trained.model_type
    most = config.file_megabytes * 1_000_000
    write_model(folder, model, weights, trained.tokenizer.end_of_text, origin, config.dtype, most)
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
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", "# Model card", ""]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join([*head, *table, ""])


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))

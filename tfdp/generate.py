"""Generates text from a trained model: `python -m tfdp.generate --run_dir DIR --prompt TEXT`."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tfdp.config.parsing import load
from tfdp.config.sections import MOST_TOKENS, SamplingConfig
from tfdp.data import inputs, strict_json
from tfdp.system.exits import ConfigError, require, require_at_most, run_command
from tfdp.system.messages import shown


@dataclass(frozen=True)
class Config(SamplingConfig):
    """The text to generate."""

    run_dir: str = "runs/latest"
    """Directory of the run, or a folder of Hugging Face, PEFT or KerasHub."""
    checkpoint: str = "best"
    """Which checkpoint: best (by validation loss, or the metric of its task), newest, or a step."""
    prompt: str = ""
    """Text to continue; empty: the beginning of a document."""
    prompts_file: str | None = None
    """File with a prompt on each line, or, if its name ends in .jsonl, a JSON text or an object with "prompt" on each;
    prints a JSON object for each. null: the one of prompt."""
    rows: int = 32
    """Prompts of prompts_file that are continued together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_most(self, rows=MOST_TOKENS)
        require(self.rows >= 1, "rows", self.rows, "must be at least 1: try 32")
        rule = "must be left out with prompts_file"
        require(not self.prompt or self.prompts_file is None, "prompt", self.prompt, rule)


def main() -> None:
    description = "Generate text that continues a prompt; prints the prompt and its continuation as it comes."
    config = load(Config, sys.argv[1:], "python -m tfdp.generate", description)
    from tfdp import api

    prompts = [config.prompt] if config.prompts_file is None else list(_prompts(inputs.path_of(config.prompts_file)))
    model = api.load(config.run_dir, config.checkpoint)
    longest = max((len(model.tokenizer.encode(prompt)) for prompt in prompts), default=0)
    if longest > model.context_length:
        print(f"note: the model sees the last {model.context_length} tokens of a prompt", file=sys.stderr)
    sampling: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(SamplingConfig)}
    if config.prompts_file is None:
        print(config.prompt, end="", flush=True)
        for piece in model.stream(config.prompt, **sampling):
            print(piece, end="", flush=True)
        print()
        return
    for start in range(0, len(prompts), config.rows):
        share = prompts[start : start + config.rows]
        for prompt, text in zip(share, model.generate(share, **sampling), strict=True):
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)


def _prompts(path: Path) -> Iterator[str]:
    """The prompts of a file. Raises `ConfigError` for one that cannot be read, naming the line."""
    try:
        lines = inputs.read(path).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"prompts_file ({shown(path)}) must be a text file in UTF-8: {reason}") from None
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, 1):
        if path.suffix != ".jsonl":
            yield line.removesuffix("\r")
            continue
        try:
            content: Any = strict_json.parse(line.encode())
            prompt = content.get("prompt") if isinstance(content, dict) else content
        except ValueError:
            prompt = None
        if not isinstance(prompt, str):
            rule = 'must be a JSON text, or an object with "prompt"'
            raise ConfigError(f"prompts_file ({shown(path)}) line {number} ({shown(line)}) {rule}")
        yield prompt


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))

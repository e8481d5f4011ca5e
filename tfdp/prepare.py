"""Turns text into token shards, once: `python -m tfdp.prepare --source S --tokenizer T --output DIR`.

Training then reads them by memory map: `python -m tfdp.train --data.source tokens:DIR`. The command may be stopped and
started again: it continues where it stopped, with the same result.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tfdp.config.parsing import load
from tfdp.config.sections import MOST_DEVICES
from tfdp.data.cleaning import Cleaning
from tfdp.data.encoding import Part
from tfdp.data.examples import ExampleKeys, make_form
from tfdp.data.manifest import SPLITS, read_manifest
from tfdp.data.preparation import Watcher, prepare
from tfdp.data.reading import Recipe
from tfdp.data.tokenizers.tokenizer import FORMS
from tfdp.system.exits import require, require_at_most, run_command


@dataclass(frozen=True)
class Config:
    """The preparation."""

    source: str = "python-stdlib"
    """Text: python-stdlib, text:GLOB, jsonl:GLOB[:FIELD], parquet:GLOB[:COLUMN], csv:GLOB[:COLUMN] or
    tfds:NAME[/CONFIG][:SPLIT][:FIELD]."""
    output: str | None = None
    """Folder for the shards; must be named."""
    tokenizer: str = "bpe:8192"
    """bytes, bpe:SIZE (trained on the text), bpe:FOLDER, gpt2:FOLDER, sentencepiece:FILE or huggingface:FOLDER."""
    validation_source: str | None = None
    """Validation text, in the same notation; null: held out from source by validation_fraction."""
    validation_fraction: float = 0.02
    """Fraction of the text held out for validation: whole documents, or its end where it is one document."""
    template: str = "auto"
    """How fields of a record become one text: as data.template of a run has it."""
    input_field: str | None = None
    """Field of a record that is seen, and not learned; null, like those below: records are plain text."""
    target_field: str | None = None
    """Field of a record that is learned."""
    label_field: str | None = None
    """Field of a record that is its class."""
    messages_field: str | None = None
    """Field of a record that is a conversation."""
    cleaning: Cleaning = Cleaning()
    licence: str | None = None
    """Licence of the text, for the manifest; null: the one that is known of the source, if any."""
    num_processes: int | None = None
    """Processes that encode; null: one for each core."""
    overlap: bool = True
    """Whether to measure how much of the validation text occurs in the training text too."""

    def __post_init__(self) -> None:
        require_at_most(self, num_processes=MOST_DEVICES)
        require(bool(self.output), "output", self.output, "must name a folder: try --output shards")
        require(
            self.num_processes is None or self.num_processes >= 1,
            "num_processes",
            self.num_processes,
            "must be at least 1",
        )
        require(
            self.validation_source is not None or 0.0 < self.validation_fraction < 1.0,
            "validation_fraction",
            self.validation_fraction,
            "must lie between 0 and 1 unless validation_source is given: try 0.05",
        )
        kind, _, address = self.tokenizer.partition(":")
        require(
            self.tokenizer == "bytes" or (kind in ("bpe", "gpt2", "sentencepiece", "huggingface") and address != ""),
            "tokenizer",
            self.tokenizer,
            f"must be one of {FORMS}",
        )


class Console(Watcher):
    """Prints the progress of a preparation: one line that is updated on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._started = self._printed = time.monotonic()
        self._num_documents = self._num_bytes = 0
        self._moving = sys.stdout.isatty()

    def say(self, line: str) -> None:
        print(f"\r\033[K{line}" if self._moving else line, flush=True)

    def warn(self, line: str) -> None:
        self.say(line)

    def part(self, part: Part) -> None:
        self._num_documents += part.num_documents
        self._num_bytes += part.num_bytes
        now = time.monotonic()
        if self._moving or now - self._printed > 10:
            self._printed = now
            print(
                f"\r\033[K{self.line()}" if self._moving else self.line(), end="" if self._moving else "\n", flush=True
            )

    def wait(self) -> None:
        self.say("another process prepares this folder: waiting for it")

    def finish(self) -> None:
        if self._num_documents:
            self.say(self.line())

    def line(self) -> str:
        """What was read so far, and how fast."""
        seconds = max(1e-9, time.monotonic() - self._started)
        return (
            f"{self._num_documents:,} documents | {self._num_bytes / 1e6:,.1f} MB | "
            f"{self._num_bytes / 1e6 / seconds:,.1f} MB/s | {seconds:,.0f} s"
        )


def main() -> None:
    description = "Turn text into token shards, once. If it is stopped, the same command continues where it was."
    config = load(Config, sys.argv[1:], "python -m tfdp.prepare", description)
    console, keys = Console(), ExampleKeys.of(config)
    form = make_form(keys, config.tokenizer, "")
    recipe = Recipe(
        config.source,
        config.validation_source,
        config.validation_fraction,
        config.tokenizer,
        config.cleaning,
        config.licence,
        form=form,
        example_keys=None if form is None else keys,
    )
    folder = Path(str(config.output))
    num_processes = config.num_processes or os.cpu_count() or 1
    prepare(recipe, folder, "output", console, num_processes, config.overlap)
    console.finish()
    trainer = "classification" if config.label_field is not None else "instruction"
    _summarise(console, folder, f" --trainer {trainer}" if recipe.form is not None else "")


def _summarise(console: Console, folder: Path, options: str) -> None:
    manifest = read_manifest(folder)
    for name in SPLITS:
        split = manifest["splits"][name]
        per_token = split["num_bytes"] / max(1, split["num_tokens"])
        console.say(
            f"{name:<10} {split['num_documents']:,} documents, {split['num_bytes'] / 1e6:,.1f} MB, "
            f"{split['num_tokens']:,} tokens, {per_token:.2f} bytes per token"
        )
    for reason, count in manifest["left_out"].items():
        console.say(f"skipped    {count:,} documents: {reason}")
    if manifest["overlap"] is not None:
        console.say(f"overlap    {manifest['overlap']['told']}")
    console.say(f"next       python -m tfdp.train{options} --data.source tokens:{folder}")


if __name__ == "__main__":
    sys.exit(run_command(main))

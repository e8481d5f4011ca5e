"""Predicts what belongs to inputs: `python -m tfdp.predict --run_dir DIR --input FILE --output FILE`.

DIR is a run of the recipe `classification` or `seq2seq`. The input is a file of records as the run was trained on,
without what is to be predicted; the output has a line of JSON for each: {"record": 1, "label": "ham", "probabilities":
{"ham": 0.9, "spam": 0.1}}, or {"record": 1, "output": "..."}.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfdp.config.parsing import load
from tfdp.config.sections import MOST_TOKENS, DecodingChoice
from tfdp.data.corpus import records_of
from tfdp.data.cutting import cut_prompt
from tfdp.data.examples import Pairs, make_form
from tfdp.system.exits import ConfigError, require, require_at_most, run_command
from tfdp.system.files import replacing
from tfdp.system.messages import shown
from tfdp.system.startup import load_tensorflow

if TYPE_CHECKING:
    from tfdp.inference.trained import TrainedModel

_PASSES = 32  # whose texts are sorted by length
_KINDS = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Config(DecodingChoice):
    """What to predict."""

    run_dir: str = "runs/latest"
    """Directory of a run of the recipe classification or seq2seq."""
    checkpoint: str = "best"
    """Which checkpoint: best (by the metric of its task), newest, or a step."""
    input: str | None = None
    """File of records: .jsonl, .csv, .tsv or .parquet (the first three compressed, too)."""
    output: str | None = None
    """File for the predictions, JSON lines, which must not exist; null: they are printed."""
    rows: int = 32
    """Texts that are computed at the same time."""

    def __post_init__(self) -> None:
        require_at_most(self, rows=MOST_TOKENS)
        require(self.rows >= 1, "rows", self.rows, "must be at least 1: try 32")
        require(bool(self.input), "input", self.input, "must name a file of records: try --input texts.jsonl")
        rule = f"must be a file whose name ends in {', '.join(_KINDS)}, or in these and .gz, .xz, .bz2 or .zst"
        require(_kind_of(str(self.input)) is not None, "input", self.input, rule)


def main() -> None:
    description = "Predict the classes or the outputs of texts; writes one JSON object for each."
    config = load(Config, sys.argv[1:], "python -m tfdp.predict", description)
    if config.output is not None:
        is_free = not os.path.lexists(config.output)
        require(is_free, "output", config.output, "must not exist: name a new file, or remove it")
    from tfdp.inference.trained import TrainedModel

    trained = TrainedModel.open(config.run_dir, config.checkpoint, "used to predict", ("make_model", "weight_shapes"))
    run = config.chosen(trained.config)
    writes = hasattr(run, "decoding")
    rule = "must be a run of the recipe classification or seq2seq"
    require(writes or len(getattr(run, "labels", ())) > 1, "run_dir", config.run_dir, rule)
    prompts = list(_prompts(config, trained))
    lines = (_outputs if writes else _classes)(config, run, trained, prompts)
    if config.output is None:
        for line in lines:
            print(line, flush=True)
        return
    try:
        with replacing(Path(config.output)) as scratch, scratch.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(f"{line}\n")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"output ({shown(config.output)}) must be a file that can be written: {reason}") from None


def _prompts(config: Config, trained: "TrainedModel") -> Iterator[tuple[int, list[int]]]:
    """The number of each record, and the ids of its text up to what is to be predicted."""
    from tfdp.data.tokenizers.tokenizer import markup_ids

    forms = [make_form(each, "bytes", "data.") for each in trained.example_keys if each.answer is not None]
    by_fingerprint = {form.fingerprint: form for form in forms if isinstance(form, Pairs)}
    rule = "must be a run that read its records itself: its shards, of an earlier version, do not say how texts look"
    require(bool(by_fingerprint), "run_dir", config.run_dir, rule)
    rule = "must be a run on examples of one template and of the same fields: those of its shards differ"
    require(len(by_fingerprint) == 1, "run_dir", config.run_dir, rule)
    (form,) = by_fingerprint.values()
    fields = [field for field in form.fields if field != form.answer]
    kind = str(_kind_of(str(config.input)))
    for number, values, where in records_of(kind, Path(str(config.input)), fields, "input"):
        text = form.prompt(dict(zip(fields, values, strict=True)), where)
        yield number, [trained.tokenizer.end_of_text, *markup_ids(trained.tokenizer, text).tolist()]


def _outputs(config: Config, run: Any, trained: "TrainedModel", prompts: list[tuple[int, list[int]]]) -> Iterator[str]:
    """Lines with what the model writes for each prompt."""
    load_tensorflow()
    import tensorflow as tf

    from tfdp.inference.hypotheses import Hypotheses

    decoding = replace(run.decoding, rows=config.rows)
    rule, strategy = run.data.too_long, tf.distribute.get_strategy()
    hypotheses = Hypotheses(strategy, trained.make_model(), trained.tokenizer, decoding, too_long=rule)
    at_a_time, num_cut, num_unfinished = config.rows * _PASSES, 0, 0
    for start in range(0, len(prompts), at_a_time):
        share = prompts[start : start + at_a_time]
        numbers = [number for number, _ in share]
        for number, found in zip(numbers, hypotheses([ids for _, ids in share], numbers), strict=True):
            notes = {**({"cut": True} if found.is_cut else {}), **({} if found.has_ended else {"unfinished": True})}
            num_cut, num_unfinished = num_cut + found.is_cut, num_unfinished + (not found.has_ended)
            yield json.dumps({"record": number, "output": found.text, **notes}, ensure_ascii=False)
    if num_cut:
        where = "before their last tokens" if rule == "cut_input" else "at their start"
        _note(f"{num_cut} of {len(prompts)} inputs were cut {where}: an output needs a part of the context")
    if num_unfinished:
        _note(f"{num_unfinished} of {len(prompts)} outputs reached {decoding.max_tokens} tokens, or the context's end")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def _classes(config: Config, run: Any, trained: "TrainedModel", prompts: list[tuple[int, list[int]]]) -> Iterator[str]:
    """Lines with the class of each prompt, and the probabilities of all."""
    load_tensorflow()
    from tfdp.data.labels import label_ids, label_room
    from tfdp.inference.classifying import ClassScorer
    from tfdp.tasks.classification import Classification

    task = Classification(run.labels, label_ids(run.labels, trained.tokenizer), run.head)
    if run.data.too_long == "cut_input":
        most = run.model.context_length + 1 - label_room(run.labels)
        prompts = [(number, cut_prompt(ids, max(1, most))) for number, ids in prompts]
    scorer = ClassScorer(trained.make_model(), task, config.rows)
    found = scorer.probabilities([ids for _, ids in prompts])
    for (number, _), probabilities in zip(prompts, found, strict=True):
        by_label = {label: round(float(each), 6) for label, each in zip(run.labels, probabilities, strict=True)}
        best = run.labels[int(probabilities.argmax())]
        yield json.dumps({"record": number, "label": best, "probabilities": by_label}, ensure_ascii=False)


def _kind_of(name: str) -> str | None:
    """The kind of source of a file, by its name without the suffix of its compression."""
    path = Path(name)
    path = path.with_suffix("") if path.suffix.lower() in (".gz", ".xz", ".bz2", ".zst", ".zstd") else path
    return _KINDS.get(path.suffix.lower())


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))

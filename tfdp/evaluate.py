"""Evaluates a trained model: `python -m tfdp.evaluate --run_dir DIR`."""

import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from tfdp.config.parsing import load
from tfdp.config.sections import MOST, MOST_TOKENS, DecodingChoice, DistributionConfig, Score
from tfdp.config.source_syntax import parse
from tfdp.recipe import FUNCTIONS
from tfdp.system.exits import require, require_at_most, run_command
from tfdp.system.startup import load_tensorflow

if TYPE_CHECKING:
    from tfdp.data.sources import Corpus
    from tfdp.inference.trained import TrainedModel


@dataclass(frozen=True)
class Config(DecodingChoice):
    """The evaluation."""

    run_dir: str = "runs/latest"
    """Directory of the run; or a folder of Hugging Face, PEFT or KerasHub, with source."""
    checkpoint: str = "best"
    """Which checkpoint: best (by validation loss, or the metric of its task), newest, or a step."""
    source: str | None = None
    """Text to evaluate on, all of it, written as data.source is; of tokens:FOLDER its validation split. null: the
    validation split of the run."""
    rows: int | None = None
    """Sequences per forward pass on each replica; null: as in training, which gives the
    loss of training to the bit on as many replicas and cores."""
    num_examples: int | None = None
    """Of a run of the recipe seq2seq: examples of each set for which outputs are written; 0: all; null: as in
    training."""
    metrics: tuple[Score, ...] | None = None
    """Of a run of the recipe seq2seq: scores of its outputs; null: as in training."""
    distribution: DistributionConfig = DistributionConfig()

    def __post_init__(self) -> None:
        require_at_most(self, rows=MOST_TOKENS, num_examples=MOST)
        is_number = self.num_examples is None or self.num_examples >= 0
        require(is_number, "num_examples", self.num_examples, "must not be negative: 0 takes all")
        require(self.rows is None or self.rows >= 1, "rows", self.rows, "must be at least 1: try 64")


def main() -> None:
    description = "Evaluate a run on its whole validation split; prints one JSON object."
    config = load(Config, sys.argv[1:], "python -m tfdp.evaluate", description)
    from tfdp import assembly
    from tfdp.inference.trained import TrainedModel

    trained = TrainedModel.open(config.run_dir, config.checkpoint, "evaluated", FUNCTIONS)
    layout = replace(config.distribution, reduction=trained.config.distribution.reduction)
    run_config = replace(trained.config, distribution=layout)
    if config.metrics is not None:
        has_scores = hasattr(run_config, "decoding")
        require(has_scores, "metrics", list(config.metrics), "is for a run of the recipe seq2seq")
        run_config = replace(run_config, metrics=config.metrics)
    run_config = config.chosen(run_config)
    if config.num_examples is not None:
        writes = hasattr(run_config, "decoding") and bool(run_config.metrics)
        rule = "is for a run of the recipe seq2seq that has metrics"
        require(writes, "num_examples", config.num_examples, rule)
        decoding = replace(run_config.decoding, num_examples=config.num_examples or None)
        run_config = replace(run_config, decoding=decoding)
    corpus = _corpus(config, trained)
    load_tensorflow()
    from tfdp.parallel import distribution
    from tfdp.tasks.task import facts_of

    rows = config.rows or run_config.training.rows_of_evaluation
    parallel = assembly.parallel_microbatches(trained.recipe, run_config, corpus, num_workers=1)
    strategy = distribution.make_strategy(layout, parallel_microbatches=parallel)
    with strategy.scope():
        model = trained.make_model()
    evaluator = assembly.make_evaluator(
        trained.recipe, run_config, corpus, strategy, model, trained.compilation, rows, parallel
    )
    result = evaluator()
    found = {
        "step": trained.step,
        **{f"validation_{name}": value for name, value in result.recorded().items()},
        "num_tokens": result.num_tokens,
        **facts_of(evaluator.task),
        "sources": {
            name: {**each.recorded(), "num_tokens": each.num_tokens, "sources": {}}
            for name, each in result.sets.items()
        },
        "corpus_sha256": corpus.corpus_sha256,
    }
    print(json.dumps(found, indent=1))


def _corpus(config: Config, trained: "TrainedModel") -> "Corpus":
    """The text of the run, or the one that is named, under the tokenizer of the model."""
    from tfdp.data import sources
    from tfdp.data.examples import ExampleKeys
    from tfdp.training.run_directory import RunDirectory

    data, named = trained.config.data, config.source
    if named is not None:
        whole = None if any(name.startswith(sources.TOKENS) for name, _ in parse(named)) else named
        own = trained.tokenizer_name if whole is not None else "auto"
        data = replace(data, source=named, validation_source=whole, tokenizer=own, partition="shuffled")
        if whole is None:  # shards have examples or text already
            data = replace(data, **asdict(ExampleKeys()))
        elif trained.example_keys:  # which those of a run on shards do not stand in its configuration
            rule = "must be a run on examples of one template and of the same fields: those of its shards differ"
            require(len(set(trained.example_keys)) == 1, "run_dir", config.run_dir, rule)
            data = replace(data, **asdict(trained.example_keys[0]))
        corpus = sources.open_corpus(data, sources.cache_dir(data))
        is_same = corpus.tokenizer.fingerprint == trained.tokenizer.fingerprint
        require(is_same, "source", named, f"must hold tokens of the tokenizer of the model, {trained.tokenizer.name}")
        return corpus
    rule = "must be named to evaluate a folder of another library: try --source 'text:notes/*.txt'"
    require(bool(trained.corpus_sha256), "source", named, rule)
    own_data = sources.with_own_tokenizer(data, RunDirectory.open(config.run_dir).tokenizer_path, data.tokenizer)
    return sources.open_same_corpus(own_data, trained.corpus_sha256)


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))

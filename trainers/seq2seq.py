"""Sequence to sequence: `--trainer seq2seq --data.source jsonl:F --data.input_field en --data.target_field de`.

For translation, summaries, answers and the like. A model learns the target of each example, and sees its input, which
sees itself whole: a prefix language model (Raffel et al. 2020). Evaluations write outputs for validation examples and
score them by `metrics`; checkpoints are compared by the first. `python -m tfdp.predict` writes outputs for a file.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tfdp import assembly
from tfdp.config.sections import DataConfig, DecodingConfig, ModelConfig, Score, TrainingConfig
from tfdp.data.sequences import Sequences, examples_of
from tfdp.data.sources import require_examples, require_whole_examples
from tfdp.recipe import import_recipe
from tfdp.system.exits import require
from trainers import causal_lm
from trainers.causal_lm import make_model, weight_shapes

if TYPE_CHECKING:
    from tfdp.data.shards import Split
    from tfdp.data.sources import Corpus
    from tfdp.tasks.seq2seq import Seq2Seq

__all__ = ["Config", "make_model", "make_sequences", "make_task", "train", "weight_shapes"]


@dataclass(frozen=True)
class Config(causal_lm.Config):
    """The run."""

    learns_examples: ClassVar[bool] = True
    # By what checkpoints are compared: a run has one measure.
    identity_keys: ClassVar[tuple[str, ...]] = (
        "metrics",
        *(f"decoding.{key}" for key in ("method", "max_tokens", "beam_size", "length_penalty", "num_examples")),
        *(f"decoding.{key}" for key in ("temperature", "top_k", "top_p", "seed")),
    )
    next_step: ClassVar[tuple[str, str]] = ("outputs", "tfdp.predict --run_dir {} --input inputs.jsonl")
    prompt_attentions: ClassVar[tuple[str, ...]] = ("whole", "causal")
    trainer: str = "seq2seq"
    """The recipe: a module of trainers/, or the dotted path of your own."""
    model: ModelConfig = ModelConfig(prompt_attention="whole")
    data: DataConfig = DataConfig(sequences="whole", document_attention=True)
    # A batch may have few targets, and its loss leaps then: only what is not finite is a spike.
    training: TrainingConfig = TrainingConfig(sample_tokens=0, spike_threshold=None)
    decoding: DecodingConfig = DecodingConfig()
    metrics: tuple[Score, ...] = ("chrf", "exact_match")
    """Scores of the outputs, see docs/tasks.md; the best checkpoint is the one with the best first score. Empty: no
    outputs are written, and checkpoints are compared by their loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole_examples(self.data)
        data = self.data
        rule = "must be null: seq2seq learns pairs; try --trainer instruction"
        require(data.messages_field is None, "data.messages_field", data.messages_field, rule)
        rule = "must be cut_input, cut_start, skip or refuse: the target stands at the end"
        require(data.too_long != "cut_end", "data.too_long", data.too_long, rule)
        require(len(set(self.metrics)) == len(self.metrics), "metrics", list(self.metrics), "must name each once")
        ends = ("{target}", f"{{{data.target_field}}}")
        rule = 'must end with "{target}": what stands behind it would be a part of the output'
        require(data.template == "auto" or data.template.endswith(ends), "data.template", data.template, rule)
        require(
            self.decoding.max_tokens < self.model.context_length,
            "decoding.max_tokens",
            self.decoding.max_tokens,
            f"must be below model.context_length ({self.model.context_length}), which holds the input too: try "
            f"{self.model.context_length // 2}",
        )


def train(config: Config) -> dict[str, Any]:
    """Trains on the pairs that the configuration names; returns what summary.json holds."""
    require_examples(config.data)
    return assembly.train(import_recipe(config.trainer), config)


def make_task(config: Config, corpus: "Corpus") -> "Seq2Seq":
    """The targets, each token from the input and from those before it."""
    from tfdp.tasks.seq2seq import Seq2Seq

    decoding = config.decoding if config.metrics else None
    return Seq2Seq(config.metrics, config.model.prompt_attention == "whole", decoding)


def make_sequences(config: Config, split: "Split") -> Sequences:
    """Rows of whole examples."""
    return examples_of(split, config.model.context_length, config.data.sequences, config.data.too_long)

"""Causal language modelling: next-token prediction on packed text. `python -m tfdp.train` runs this recipe.

What a recipe must define, and who asks for it, stands in `tfdp/recipe.py`. TensorFlow is loaded only once the
configuration and the text are known to be right, so what needs it is imported inside the functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tfdp import assembly
from tfdp.config.islands import require_islands_fit
from tfdp.config.sections import (
    MOST_TOKENS,
    CheckpointConfig,
    DataConfig,
    DistributionConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from tfdp.data.sequences import Sequences, sequences_of
from tfdp.models import dimensions, lora
from tfdp.recipe import import_recipe
from tfdp.system.exits import require

if TYPE_CHECKING:
    from tfdp.data.shards import Split
    from tfdp.data.sources import Corpus
    from tfdp.models.gpt import GPT
    from tfdp.tasks.causal_lm import CausalLM


@dataclass(frozen=True)
class Config:
    """The run."""

    prompt_attentions: ClassVar[tuple[str, ...]] = ("causal",)
    run_dir: str | None = None
    """Where everything of this run is written; an existing one is resumed; null: a new runs/DATE-TIME."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and dropout."""
    trainer: str = "causal_lm"
    """The recipe: a module of trainers/, or the dotted path of your own."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    distribution: DistributionConfig = DistributionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        # The order of the data looks at the low 30 bits of a seed only.
        require(0 <= self.seed < 2**30, "seed", self.seed, "must lie in [0, 2**30): try 0")
        require(self.run_dir != "", "run_dir", self.run_dir, "must name a folder: try --run_dir runs/NAME")
        largest = MOST_TOKENS // self.model.context_length
        require(
            self.training.global_batch_size <= largest,
            "training.global_batch_size",
            self.training.global_batch_size,
            f"must be at most 2**24 tokens, {largest} sequences of model.context_length: try {largest}",
        )
        require_islands_fit(self)
        rule = f"must be {' or '.join(self.prompt_attentions)} with trainer {self.trainer}: whole is for seq2seq"
        attention = getattr(self.model, "prompt_attention", "causal")
        require(attention in self.prompt_attentions, "model.prompt_attention", attention, rule)
        require(
            self.distribution.reduction == "fast" or self.training.microbatch_size is not None,
            "distribution.reduction",
            self.distribution.reduction,
            f"needs training.microbatch_size, the unit that is the same under every layout: try "
            f"{max(1, self.training.global_batch_size // 4)}",
        )


def train(config: Config) -> dict[str, Any]:
    """Trains the recipe that the configuration names; returns what summary.json holds."""
    rule = "must be cut_start, cut_end, skip or refuse: all of a text is learned"
    require(config.data.too_long != "cut_input", "data.too_long", config.data.too_long, rule)
    return assembly.train(import_recipe(config.trainer), config)


def make_model(config: Config, vocab_size: int, fuse: bool) -> "GPT":
    """A GPT with its initial weights: random ones, or those of `model.init_from`."""
    from tfdp.interop.origin import given_weights
    from tfdp.models.gpt import GPT

    training, given = config.training, given_weights(config.model, vocab_size)
    return GPT(config.model, vocab_size, config.seed, training.precision, training.remat, fuse, given)


def make_task(config: Config, corpus: "Corpus") -> "CausalLM":
    """The next token, of all before it or of those of its document."""
    from tfdp.tasks.causal_lm import CausalLM

    return CausalLM(corpus.tokenizer.end_of_text if config.data.document_attention else None)


def make_sequences(config: Config, split: "Split") -> Sequences:
    """Rows of `context_length` tokens and one more, as `data.sequences` cuts them."""
    return sequences_of(split, config.model.context_length, config.data.sequences, config.data.too_long)


def weight_shapes(config: Config, vocab_size: int) -> Mapping[str, tuple[int, ...]]:
    """Those of the GPT, and of its adapters."""
    return {**dimensions.weight_shapes(config.model, vocab_size), **lora.adapter_shapes(config.model)}

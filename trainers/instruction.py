"""Supervised fine-tuning on examples: `--trainer instruction --data.source jsonl:F --data.messages_field messages`.

A model learns what follows a prompt, or what the assistant of a conversation says, and sees the rest. It starts from a
model that exists (`model.init_from`), whole or with adapters (`model.lora_rank`), or from nothing. Examples share rows
and do not see each other. What fields and templates there are: `tfdp/data/examples.py`; `python -m tfdp.chat` talks
with the result.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tfdp import assembly
from tfdp.config.sections import DataConfig, TrainingConfig
from tfdp.data.sequences import Sequences, examples_of
from tfdp.data.sources import example_keys, require_examples, require_whole_examples
from tfdp.recipe import import_recipe
from trainers import causal_lm
from trainers.causal_lm import make_model, weight_shapes

if TYPE_CHECKING:
    from tfdp.data.shards import Split
    from tfdp.data.sources import Corpus
    from tfdp.tasks.answers import Answers

__all__ = ["Config", "make_model", "make_sequences", "make_task", "train", "weight_shapes"]


@dataclass(frozen=True)
class Config(causal_lm.Config):
    """The run."""

    learns_examples: ClassVar[bool] = True
    trainer: str = "instruction"
    """The recipe: a module of trainers/, or the dotted path of your own."""
    data: DataConfig = DataConfig(sequences="whole", document_attention=True)
    # A batch may have few targets, and its loss leaps then: only what is not finite is a spike.
    training: TrainingConfig = TrainingConfig(spike_threshold=None)
    score_prompts: bool = False
    """Whether prompts are learned as well as answers."""

    @property
    def next_step(self) -> tuple[str, str]:
        """What the model is for: see `RunDirectory.next_steps`."""
        is_of_pairs = any(each.answer is not None for each in example_keys(self.data))
        return (
            ("more text", "tfdp.generate --run_dir {} --prompt ...")
            if is_of_pairs
            else ("chat", "tfdp.chat --run_dir {}")
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole_examples(self.data)


def train(config: Config) -> dict[str, Any]:
    """Trains on the examples that the configuration names; returns what summary.json holds."""
    require_examples(config.data)
    return assembly.train(import_recipe(config.trainer), config)


def make_task(config: Config, corpus: "Corpus") -> "Answers":
    """The answers, each token from all of its example before it."""
    from tfdp.tasks.answers import Answers

    return Answers(config.score_prompts)


def make_sequences(config: Config, split: "Split") -> Sequences:
    """Rows of whole examples."""
    return examples_of(split, config.model.context_length, config.data.sequences, config.data.too_long)

"""Generates text from a trained model: `python -m tfdp.generate --run_dir DIR --prompt TEXT`."""

import sys
from dataclasses import dataclass

from tfdp.config.parsing import load
from tfdp.config.sections import SamplingConfig
from tfdp.system.exits import run_command
from tfdp.system.startup import load_tensorflow


@dataclass(frozen=True)
class Config(SamplingConfig):
    """The text to generate."""

    run_dir: str = "runs/latest"
    """Directory of the run."""
    checkpoint: str = "best"
    """Which checkpoint: best (by validation loss, or the metric of its task), newest, or a step."""
    prompt: str = ""
    """Text to continue; empty: the beginning of a document."""


def main() -> None:
    description = "Generate text that continues a prompt; prints the prompt and its continuation."
    config = load(Config, sys.argv[1:], "python -m tfdp.generate", description)
    from tfdp.inference.trained import TrainedGPT

    trained = TrainedGPT.open(config.run_dir, config.checkpoint, "read back")
    seen = trained.config.model.context_length
    if len(trained.tokenizer.encode(config.prompt)) > seen:
        print(f"note: the model sees the last {seen} tokens of the prompt", file=sys.stderr)
    load_tensorflow()
    from tfdp.inference.sampling import Sampler

    sampler = Sampler(trained.make_model(), trained.tokenizer)
    print(config.prompt + sampler.text(config.prompt, config))


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))

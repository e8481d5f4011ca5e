"""Writes a trained model in the format of another library: `python -m tfdp.export --run_dir DIR --output FOLDER`."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tfdp.config.parsing import load
from tfdp.inference.exporting import LOADERS, ExportConfig, export, require_free
from tfdp.inference.trained import TrainedModel
from tfdp.system.exits import run_command
from tfdp.system.startup import load_tensorflow


@dataclass(frozen=True)
class Config(ExportConfig):
    """The export."""

    run_dir: str = "runs/latest"
    """Directory of the run, or a folder of another library."""
    checkpoint: str = "best"
    """Which checkpoint: best (by validation loss, or the metric of its task), newest, or a step."""


def main() -> None:
    description = "Write a trained model in the format of another library."
    config = load(Config, sys.argv[1:], "python -m tfdp.export", description)
    require_free(str(config.output))
    trained = TrainedModel.open(config.run_dir, config.checkpoint, "exported")
    if config.format in ("keras_hub", "saved_model", "onnx"):
        load_tensorflow()
    name = Path(config.run_dir).name
    export(trained, config, f"python -m tfdp.export --run_dir {name} --checkpoint {config.checkpoint}")
    print(f"exported   {config.output}, step {trained.step} of {config.run_dir}")
    print(f"next       {LOADERS[config.format].format(config.output)}")


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))

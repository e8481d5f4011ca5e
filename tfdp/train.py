"""Trains a model: `python -m tfdp.train [--config FILE.yaml] [--section.key VALUE ...]`.

With no argument it trains a byte-level GPT on the source code of Python's standard library. The work is done
by the recipe that the key `trainer` names. Its `train` is called before TensorFlow is loaded, so that it can tell at
once what is wrong with a run; then it loads TensorFlow with `tfdp.startup.load_tensorflow`.
"""

import sys

from tfdp.config import config_class, find_trainer, import_trainer, load, with_run_config
from tfdp.exits import end, run_command


def main() -> None:
    arguments = with_run_config(sys.argv[1:])
    trainer = find_trainer(arguments)
    recipe = import_trainer(trainer)
    description = (
        "Train a GPT with data parallelism. With no argument: a byte-level GPT on the source code of Python's "
        "standard library, about a minute and a half on two CPU cores."
    )
    config = load(config_class(recipe, trainer), arguments, "python -m tfdp.train", description)
    recipe.train(config)


if __name__ == "__main__":
    # Everything is written and closed by now; TensorFlow's own way out would wait for workers that have left already.
    end(run_command(main))

"""Trains a model: `python -m tfdp.train [--config FILE.yaml] [--section.key VALUE ...]`.

With no argument it trains a byte-level GPT on the source code of Python's standard library. The work is done
by the recipe that the key `trainer` names (`tfdp/recipe.py`).
"""

import sys

from tfdp import assembly
from tfdp.config.parsing import load
from tfdp.config.run_config import with_run_config
from tfdp.recipe import config_class, find_trainer, import_recipe
from tfdp.system.exits import end, run_command


def main() -> None:
    arguments = with_run_config(sys.argv[1:])
    trainer = find_trainer(arguments)
    recipe = import_recipe(trainer)
    description = (
        "Train a GPT with data parallelism. With no argument: a byte-level GPT on the source code of Python's "
        "standard library, about a minute and a half on two CPU cores."
    )
    config = load(config_class(recipe, trainer), arguments, "python -m tfdp.train", description)
    own = getattr(recipe, "train", None)  # of a program, or of a recipe that does more than the library
    own(config) if own is not None else assembly.train(recipe, config)


if __name__ == "__main__":
    # Everything is written and closed by now; TensorFlow's own way out would wait for workers that have left already.
    end(run_command(main))

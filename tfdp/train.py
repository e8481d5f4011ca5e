"""Trains a model: `python -m tfdp.train [--config FILE.yaml] [--section.key VALUE ...]`.

With no argument it trains a byte-level GPT on the source code of Python's standard library. The work is done
by the recipe that the key `trainer` names (`tfdp/recipe.py`).
"""

import sys

from tfdp import assembly
from tfdp.config.run_config import with_run_config
from tfdp.interop.origin import with_origin_keys
from tfdp.recipe import load_recipe
from tfdp.system.exits import end, run_command


def main() -> None:
    arguments = with_run_config(sys.argv[1:])
    description = (
        "Train a GPT with data parallelism. With no argument: a byte-level GPT on the source code of Python's "
        "standard library, about a minute and a half on two CPU cores."
    )
    recipe, config = load_recipe(arguments, "python -m tfdp.train", description, with_origin_keys)
    if hasattr(recipe, "train"):  # a program of its own, or a recipe with its own way to train
        recipe.train(config)
    else:
        assembly.train(recipe, config)


if __name__ == "__main__":
    # Everything is written and closed by now; TensorFlow's own exit would wait for workers that have left already.
    end(run_command(main))

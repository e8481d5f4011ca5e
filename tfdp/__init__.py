"""tfdp: data-parallel training of GPT language models on TensorFlow and Keras 3.

Start with `python -m tfdp.train --help`; docs/design.md has the map of the modules. From Python:

    tfdp.train(run_dir="runs/mine", training={"steps": 200})    trains, or resumes
    tfdp.fit(model, run_dir="runs/own")                         trains a Keras model
    tfdp.load("runs/mine").generate("def ")                     text, logits and scores; exports
"""

from typing import Any

from tfdp.system.version import VERSION

__version__ = VERSION

_FUNCTIONS = ("fit", "load", "train")


def __getattr__(name: str) -> Any:
    """The functions above, imported when one is asked for: commands do without them."""
    if name in _FUNCTIONS:
        from tfdp import api

        return getattr(api, name)
    raise AttributeError(f"module 'tfdp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_FUNCTIONS]

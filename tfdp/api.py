"""tfdp from Python: `tfdp.load`, `tfdp.train`, `tfdp.fit`. Each does what a command does, and raises what it prints."""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfdp import assembly
from tfdp.config.run_config import flatten_mapping, with_run_config
from tfdp.inference.language_model import LanguageModel
from tfdp.inference.trained import TrainedGPT
from tfdp.interop.origin import complete
from tfdp.recipe import load_recipe
from tfdp.system.exits import ConfigError, require

if TYPE_CHECKING:
    import keras


def load(path: str, checkpoint: str | int = "best") -> LanguageModel:
    """A trained model.

    Args:
      path: the directory of a run, or a folder of Hugging Face, PEFT or KerasHub.
      checkpoint: of a run: best (by validation loss, or the metric of its task), newest, or a step.

    Raises:
      ConfigError: there is no such run, folder or checkpoint, or one that is damaged or not understood.
    """
    return LanguageModel(TrainedGPT.open(str(path), str(checkpoint), "read back"))


def train(config: str | os.PathLike[str] | Mapping[str, Any] | None = None, /, **sections: Any) -> dict[str, Any]:
    """Trains, or resumes, as `python -m tfdp.train` does.

    Args:
      config: a YAML file, or the same as a mapping, {"training": {"steps": 100}}; None: the default job.
      **sections: the same keys, which win: training={"steps": 100}.

    Returns:
      What summary.json holds.

    Raises:
      ConfigError: a mistake in a key; see the other exceptions of `tfdp.system.exits`.
    """
    if multiprocessing.parent_process() is not None:  # it would wait for what its parent holds
        raise ConfigError('tfdp.train must stand below `if __name__ == "__main__":` in a script: others import it')
    is_known = config is None or isinstance(config, str | os.PathLike | Mapping)
    require(is_known, "config", type(config).__name__, "must be the path of a YAML file, or a mapping")
    file = [f"--config={os.fspath(config)}"] if isinstance(config, str | os.PathLike) else []
    values = flatten_mapping(config) if isinstance(config, Mapping) else {}
    values |= flatten_mapping(sections)
    flags = [f"--{key}={_text_of(value)}" for key, value in values.items()]
    recipe, made = load_recipe(with_run_config([*file, *flags]), "tfdp.train", "", complete)
    found: dict[str, Any] = recipe.train(made) if hasattr(recipe, "train") else assembly.train(recipe, made)
    return found


def fit(
    model: "keras.Model | Callable[..., keras.Model]",
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    /,
    **sections: Any,
) -> dict[str, Any]:
    """Trains a Keras model on next tokens, as its own `fit` cannot: in any layout, resumed to the bit.

    Args:
      model: a `keras.Model` from token ids (batch, time) to logits (batch, time, vocabulary), which is saved beside the
        run directory, as RUN_DIR.keras. Or a function of a module that returns one, or a backbone of KerasHub: it is
        called inside the scope of the strategy, in each process, with vocab_size and context_length where it has such
        arguments. Several workers need a function.
      config, **sections: as those of `train`; model={"context_length": 256}, say.

    Returns:
      What summary.json holds.

    Raises:
      ConfigError: besides what `train` raises, a model that no step can train; the message says why.
    """
    own = dict(sections.pop("model", {}))
    if hasattr(model, "save"):
        run_dir = sections.get("run_dir") or (config.get("run_dir") if isinstance(config, Mapping) else None)
        require(bool(run_dir), "run_dir", run_dir, "must be named, to save the model beside it: try runs/mine")
        path = Path(f"{run_dir}.keras")
        if not Path(str(run_dir)).exists():  # a run that is resumed has its model already
            path.parent.mkdir(parents=True, exist_ok=True)
            model.save(path)
        own |= {"builder": "keras.saving:load_model", "arguments": json.dumps({"filepath": str(path)})}
    else:
        own["builder"] = f"{_module_of(model)}:{model.__qualname__}"
        rule = "must be a function of a module, so that every process that reads the run finds it"
        require("<" not in own["builder"], "builder", own["builder"], rule)
    return train(config, **{"trainer": "keras_model", **sections, "model": own})


def _module_of(function: Any) -> str:
    """The name by which another process imports the module of a function; of a script, that of its file."""
    name, file = str(function.__module__), getattr(sys.modules["__main__"], "__file__", None)
    return Path(file).stem if name == "__main__" and file is not None else name


def _text_of(value: Any) -> str:
    """A value as a flag has it."""
    return os.fspath(value) if isinstance(value, str | os.PathLike) else json.dumps(value)

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
from tfdp.inference.trained import TrainedModel
from tfdp.interop.origin import has_checkpoints, with_origin_keys
from tfdp.recipe import Recipe, load_recipe
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
    return LanguageModel(TrainedModel.open(str(path), str(checkpoint), "read back"))


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
    return _run(*_configured(config, sections))


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
    own = sections.pop("model", {})
    require(isinstance(own, Mapping), "model", type(own).__name__, "must be a mapping of the keys of section model")
    if hasattr(model, "save"):
        return _fit_saved(model, config, sections, own)
    require(hasattr(model, "__qualname__"), "model", type(model).__name__, "must be a keras.Model or a function")
    builder = f"{_module_of(model)}:{model.__qualname__}"
    rule = "must be a function of a module, so that every process that reads the run finds it"
    require("<" not in builder, "builder", builder, rule)
    return train(config, **{"trainer": "keras_model", **sections, "model": {**own, "builder": builder}})


def _fit_saved(model: Any, config: Any, sections: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Trains a model that exists, which each reader of the run loads from RUN_DIR.keras."""
    run_dir = sections.get("run_dir") or (config.get("run_dir") if isinstance(config, Mapping) else None)
    require(bool(run_dir), "run_dir", run_dir, "must be named, to save the model beside it: try runs/mine")
    path = Path(f"{run_dir}.keras").absolute()
    saved = {"builder": "keras.saving:load_model", "arguments": json.dumps({"filepath": str(path)})}
    keys = {"trainer": "keras_model", **sections, "model": {**own, **saved}}
    recipe, made = _configured(config, keys)  # before anything is written
    from tfdp.parallel.cluster_spec import find_cluster

    rule = "must be a function that builds it where there are several workers"
    require(find_cluster(made.distribution).num_workers == 1, "model", type(model).__name__, rule)
    if has_checkpoints(str(run_dir)):
        _require_same(model, path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.stem}.{os.getpid()}.keras")
        model.save(scratch)
        os.replace(scratch, path)
    return _run(recipe, made)


def _require_same(model: Any, path: Path) -> None:
    """Raises `ConfigError` where a run was begun with another model than the one that is given now."""
    import keras

    def form(each: Any) -> list[tuple[str, tuple[int, ...]]]:
        return [(variable.name, tuple(variable.shape)) for variable in each.weights]

    try:
        begun = keras.saving.load_model(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model ({path}) of the run cannot be read: {error}") from None
    rule = "must be the one that the run was begun with: name another run_dir"
    require(form(begun) == form(model), "model", type(model).__name__, rule)


def _configured(config: Any, sections: Mapping[str, Any]) -> tuple[Recipe, Any]:
    """The recipe and its configuration, from a file or a mapping and the keys that win over it."""
    if multiprocessing.parent_process() is not None:  # it would wait for what its parent holds
        raise ConfigError('tfdp.train must stand below `if __name__ == "__main__":` in a script: others import it')
    is_known = config is None or isinstance(config, str | os.PathLike | Mapping)
    require(is_known, "config", type(config).__name__, "must be the path of a YAML file, or a mapping")
    file = [f"--config={os.fspath(config)}"] if isinstance(config, str | os.PathLike) else []
    values = flatten_mapping(config) if isinstance(config, Mapping) else {}
    values |= flatten_mapping(sections)
    flags = [f"--{key}={_text_of(value)}" for key, value in values.items()]
    return load_recipe(with_run_config([*file, *flags]), "tfdp.train", "", with_origin_keys)


def _run(recipe: Recipe, config: Any) -> dict[str, Any]:
    found: dict[str, Any] = recipe.train(config) if hasattr(recipe, "train") else assembly.train(recipe, config)
    return found


def _module_of(function: Any) -> str:
    """The name by which another process imports the module of a function; of a script, that of its file."""
    main = sys.modules["__main__"]
    if function.__module__ != "__main__":
        return str(function.__module__)
    if main.__spec__ is not None:  # `python -m package.module`
        return main.__spec__.name
    file = getattr(main, "__file__", None)
    return Path(file).stem if file is not None else "__main__"


def _text_of(value: Any) -> str:
    """A value as a flag has it."""
    return os.fspath(value) if isinstance(value, str | os.PathLike) else json.dumps(value)

"""A configuration, read from YAML and flags into the dataclasses of `sections.py`.

Precedence: defaults < the YAML of `--config` < flags, whatever their order on the command line.

It does not need TensorFlow: every mistake that can be found without a device is found here, as a `ConfigError` of one
line that names key, value, rule and fix.
"""

import dataclasses
import math
import re
import sys
import typing
from argparse import SUPPRESS
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tfdp.config import options
from tfdp.config.run_config import flatten_mapping
from tfdp.system.exits import require

ConfigType = TypeVar("ConfigType")
SMALLEST, LARGEST = 1e-37, 1e37  # magnitude of a number that float32 can hold


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------


def load(
    config_class: type[ConfigType],
    argv: Sequence[str],
    prog: str,
    description: str,
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda values: values,
) -> ConfigType:
    """Reads defaults, `--config FILE` and flags into a `config_class`.

    Args:
      config_class: a frozen dataclass; its fields are sections (dataclasses) or plain values.
      argv: command-line arguments without the program's name.
      prog: the program's name for `--help`, such as "python -m tfdp.train".
      description: the first paragraph of `--help`.
      complete: adds keys that follow from those that were given, all by dotted key.

    Raises:
      ConfigError: an unknown key, a wrong type, a missing file, or a rule of a section broken.
      SystemExit: after `--help` or `--print_config`, with code 0.
    """
    keys = known_keys(config_class)
    flags = options.split(argv, keys)
    if ("help", "") in flags:
        _make_parser(config_class, prog, description).parse_args(["--help"])
    values: dict[str, Any] = {}
    for name, path in flags:
        values.update(options.of_file(Path(path), keys) if name == "config" else {})
    values.update(options.of_flags(flags, keys))
    config = _build(config_class, complete(values), "")
    if ("print_config", "") in flags:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def load_file(config_class: type[ConfigType], path: Path) -> ConfigType:
    """Reads one YAML file, such as a run directory's config.yaml. Raises `ConfigError` as `load` does."""
    return load(config_class, ["--config", str(path)], prog="config", description="")


def to_yaml(config: object, without: Collection[str] = ()) -> str:
    """The resolved configuration as YAML, which `--config` reads back to an equal object; the keys in `without` are
    omitted."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        looks_like_a_number = re.match(r"[-+.]*\d", text)  # 3e-4 is text to PyYAML, and a number to jsonargparse
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if looks_like_a_number else None)

    Dumper.add_representer(str, represent)
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in without}  # type: ignore[call-overload]
    return yaml.dump(values, Dumper=Dumper, sort_keys=False)


def known_keys(config_class: type) -> dict[str, Any]:
    """Maps every dotted key of a config class to its type; sections themselves are omitted."""
    keys: dict[str, Any] = {}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            keys.update({f"{field.name}.{key}": value for key, value in known_keys(kind).items()})  # type: ignore[arg-type]
        else:
            keys[field.name] = kind
    return keys


def flatten(config: object) -> dict[str, Any]:
    """The values of a configuration by dotted key."""
    return flatten_mapping(dataclasses.asdict(config))  # type: ignore[call-overload]


def _make_parser(config_class: type, prog: str, description: str) -> Any:
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False, default_env=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below; flags win over it")
    parser.add_class_arguments(config_class, nested_key=None)
    hints = typing.get_type_hints(config_class)
    for action in parser._actions:
        if dataclasses.is_dataclass(hints.get(action.dest)):
            action.help = SUPPRESS  # `--model FILE`: one way to name a file is enough, and that is --config
    return parser


_MISSING = dataclasses.MISSING


def _build(cls: type[ConfigType], values: Mapping[str, Any], prefix: str, default: object = None) -> ConfigType:
    """Turns values by dotted key into the dataclasses; each one's `__post_init__` checks its own rules."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        key, kind = f"{prefix}{field.name}", hints[field.name]
        own = getattr(default, field.name) if default is not None else _default_of(field)
        if dataclasses.is_dataclass(kind):
            arguments[field.name] = _build(kind, values, f"{key}.", None if own is _MISSING else own)  # type: ignore[arg-type]
        elif key in values:
            _check_value(key, values[key])
            arguments[field.name] = values[key]
        else:
            require(own is not _MISSING, key, None, f"must be given: {options.describe(kind)}")
            arguments[field.name] = own
    return cls(**arguments)


def _default_of(field: "dataclasses.Field[Any]") -> Any:
    return field.default_factory() if field.default_factory is not _MISSING else field.default


def _check_value(key: str, value: object) -> None:
    """Checks the rules that all numbers and all text share."""
    if isinstance(value, float):
        require(math.isfinite(value), key, value, "must be a finite number")
        is_float32 = value == 0 or SMALLEST <= abs(value) <= LARGEST
        require(
            is_float32, key, value, f"must be 0 or of a size from {SMALLEST:g} to {LARGEST:g}, which float32 can hold"
        )
    if isinstance(value, str):
        require("\0" not in value, key, value, "must not hold the character NUL")
        with_help = "" if sys.getfilesystemencoding() == "utf-8" else ": try PYTHONUTF8=1 in the environment"
        require(_can_be_written(value), key, value, f"must be text in UTF-8{with_help}")


def _can_be_written(text: str) -> bool:
    """Whether the text can be written into a file and used as a path."""
    try:
        text.encode("utf-8")
        text.encode(sys.getfilesystemencoding())
    except UnicodeEncodeError:
        return False
    return True

"""Keys of a command as the keyword arguments of Python: each value is checked as the command checks it."""

from collections.abc import Mapping
from typing import Any, TypeVar

from tfdp.config import options
from tfdp.config.parsing import known_keys
from tfdp.config.sections import SamplingConfig
from tfdp.system.exits import require

Keys = TypeVar("Keys")


def sampling_of(keys: Mapping[str, Any]) -> SamplingConfig:
    """How to draw. Raises `ConfigError` for a key or value that is wrong."""
    stop = keys.get("stop", ())
    require(not isinstance(stop, str), "stop", stop, 'must be a list of texts: try ["\\n\\n"]')
    return typed(SamplingConfig, {**keys, "stop": list(stop)})


def typed(kind: type[Keys], keys: Mapping[str, Any]) -> Keys:
    """A section of keys. Raises `ConfigError` for a key or value that is wrong."""
    known = known_keys(kind)
    for key, value in keys.items():
        require(key in known, key, value, f"must be one of {', '.join(known)}")
    return kind(**{key: options.read(key, known[key], value) for key, value in keys.items()})

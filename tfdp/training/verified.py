"""The files of a checkpoint, verified by their sha256 when they are read."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfdp.system.exits import CommandError, ConfigError

STATE_FILE, SUMS_FILE = "state.json", "SHA256SUMS"
TENSOR_FILES = ("weights.safetensors", "optimizer.safetensors")
AVERAGE_FILE = "average.safetensors"  # where a run has an average of its weights


class DamagedCheckpoint(ConfigError):
    """A checkpoint is not what was saved; the one before it takes its place."""


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedCheckpoint(f"checkpoint {path.parent} is incomplete: {path.name}: {error.strerror}") from None
    except OSError as error:
        raise CommandError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None


def read_verified(path: Path, digest: str | None) -> bytes:
    data = _read(path)
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: its sha256 is not the one it was saved with")
    return data


def read_sums(path: Path) -> dict[str, str]:
    """The sha256 of each file by its name; {} for a checkpoint of before there were such."""
    if not os.path.lexists(path):
        return {}
    data = _read(path)
    found = {name: digest for digest, _, name in (line.partition("  ") for line in data.decode("latin1").splitlines())}
    if data != sums_text(found) or {*found} - {AVERAGE_FILE} != {*TENSOR_FILES, STATE_FILE}:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: it is not a list of the sha256 of each file")
    return found


def sums_text(digests: Mapping[str, str]) -> bytes:
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()


def read_state(path: Path, digest: str | None) -> dict[str, Any]:
    """Reads state.json. Without a digest, of before there were such, it is only checked to be JSON."""
    try:
        state = json.loads(read_verified(path, digest))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: it is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: it holds no keys")
    return state

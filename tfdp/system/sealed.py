"""JSON files that contain the sha256 of their own content, so that reading one detects damage."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tfdp.system.files import write_whole

SEAL = "sha256"


def write_sealed(path: Path, content: dict[str, Any], indent: int | None = 1) -> None:
    """Writes an object whole or not at all, with its digest as one more key."""
    text = json.dumps({**content, SEAL: _digest(content)}, indent=indent, ensure_ascii=False)
    # The name of a file that is not UTF-8 has surrogates, which UTF-8 cannot hold: they become escapes of JSON.
    write_whole(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


def read_sealed(path: Path, needs_seal: bool = True) -> dict[str, Any]:
    """The content of a file that `write_sealed` wrote, without its digest.

    Args:
      path: of the file.
      needs_seal: whether a file without a digest is refused; one that has a digest must have the right one in any case.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not a JSON object, or has changed since it was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    if needs_seal or SEAL in content:
        seal = content.pop(SEAL, None)
        if seal != _digest(content):
            raise ValueError("its content is not what was written")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

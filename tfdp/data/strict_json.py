"""JSON of a file: one value, in whose objects no key stands twice."""

import json

from tfdp.system.messages import shown

_BOM = b"\xef\xbb\xbf"


class DuplicateKeyError(ValueError):
    """An object has a key twice, and it cannot be known which of the two values is meant."""


def parse(data: bytes) -> object:
    """The value that UTF-8 bytes hold; a byte order mark before it is passed over.

    Raises:
      UnicodeDecodeError: the bytes are not UTF-8.
      ValueError: they are not JSON, or hold a `DuplicateKeyError`; with a message of one line.
    """
    if data.startswith(_BOM):
        data = data[len(_BOM) :]
    try:
        return _DECODER.decode(data.decode("utf-8", "surrogatepass"))
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DuplicateKeyError(f"the key {shown(twice)} stands there twice: remove one")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # kept, because making one takes longer than a short line

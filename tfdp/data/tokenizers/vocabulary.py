"""The files of a byte-level BPE vocabulary: tokens with their ids, and merges."""

import os
from pathlib import Path

from tfdp.data import inputs, strict_json
from tfdp.system.exits import ConfigError
from tfdp.system.messages import shown

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_FILE, MERGES_FILE = "vocabulary.json", "merges.txt"
LARGEST_SIZE = 1 << 20  # ids, those without a token included


def byte_characters() -> list[str]:
    """The character that GPT-2 writes for each byte: itself where it is printable, else one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_BYTE_OF = {char: byte for byte, char in enumerate(byte_characters())}


def bytes_of(token: str) -> bytes:
    """What a token stands for: the bytes that its characters write, or its own UTF-8 where one of them writes none.

    The latter holds for tokens that were added to a vocabulary; it is what `tokenizers` makes of them.
    """
    if all(char in _BYTE_OF for char in token):
        return bytes(_BYTE_OF[char] for char in token)
    return token.encode()


def read(folder: Path, where: str) -> tuple[dict[str, int], list[str]]:
    """Reads token -> id and the merges: vocabulary.json, vocab.json or encoder.json; merges.txt or vocab.bpe.

    Raises:
      ConfigError: "`where` must ...": a file is missing or not what it should be.
    """
    vocabulary_path = _first_file(folder, (VOCABULARY_FILE, "vocab.json", "encoder.json"), where)
    merges_path = _first_file(folder, (MERGES_FILE, "vocab.bpe"), where)
    try:
        found = strict_json.parse(inputs.read(vocabulary_path))
        lines = inputs.read(merges_path).decode("utf-8").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{where} must hold a vocabulary in JSON and merges in UTF-8: {reason}") from None
    if not isinstance(found, dict) or not all(type(index) is int and index >= 0 for index in found.values()):
        raise ConfigError(f"{where}: {vocabulary_path.name} must map tokens to ids")
    merges = [line for number, line in enumerate(lines) if line and not (number == 0 and line.startswith("#version"))]
    return found, merges


def check(vocabulary: dict[str, int], merges: list[str], where: str) -> None:
    """Raises `ConfigError` "`where`: ..." for what encodes not every text, or not in one way only.

    Besides the bytes, what merges make and the end of text there may be other tokens, which no text is encoded to.
    """
    if END_OF_TEXT not in vocabulary:
        raise ConfigError(f"{where}: the vocabulary must have the token {END_OF_TEXT}")
    missing = [char for char in byte_characters() if char not in vocabulary]
    if missing:
        raise ConfigError(f"{where}: the vocabulary must have all 256 bytes: {missing[0]!r} is not in it")
    _check_ids(vocabulary, where)
    for number, merge in enumerate(merges):
        parts = merge.split(" ")
        made = "".join(parts)
        if len(parts) != 2 or not all(part in vocabulary and part for part in (*parts, made)):
            raise ConfigError(f"{where}: merge {number} ({shown(merge)}) must be two tokens that make a third")
        if made == END_OF_TEXT:
            raise ConfigError(f"{where}: merge {number} ({shown(merge)}) must not make the end of text: leave it out")


def _check_ids(vocabulary: dict[str, int], where: str) -> None:
    tokens: dict[int, str] = {}
    for token, index in vocabulary.items():
        told = f"{where}: the token {shown(token)}"
        if any(0xD800 <= ord(char) < 0xE000 for char in token):
            raise ConfigError(f"{told} must be Unicode: it has half of a surrogate pair")
        if index >= LARGEST_SIZE:
            raise ConfigError(f"{told} must have an id below {LARGEST_SIZE:,}, and has {shown(index)}")
        if index in tokens:
            raise ConfigError(f"{told} must have an id of its own, and shares {index} with {shown(tokens[index])}")
        tokens[index] = token


def _first_file(folder: Path, names: tuple[str, ...], where: str) -> Path:
    for name in names:
        if os.path.lexists(folder / name):
            return folder / name
    raise ConfigError(f"{where} must be a folder with {' or '.join(names)}")

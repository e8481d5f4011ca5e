"""Tokenizers of Hugging Face folders: `tokenizer.json`, run by the library `tokenizers`.

Beside it lie the names of the special tokens and the chat template (`tokenizer_config.json`, `special_tokens_map.json`,
`chat_template.jinja`), which are kept as they are.
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tfdp.data import inputs, strict_json
from tfdp.data.tokenizers.vocabulary import LARGEST_SIZE, bytes_of
from tfdp.system.exits import ConfigError
from tfdp.system.messages import one_line, shown

TOKENIZER_FILE = "tokenizer.json"
_NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_MODEL_FILES = ("generation_config.json", "config.json")  # have the id of the end of text where no name is given
KEPT_FILES = (TOKENIZER_FILE, *_NAMING_FILES, "chat_template.jinja")


class HuggingFaceTokenizer:
    """A `tokenizer.json`; its end of sequence (`eos_token`) is the end of text.

    Text is text: what looks like a special token in a document is encoded as its characters. In a prompt it is the
    special token, and a prompt begins as `tokenizer.json` says, with a beginning of sequence or without.

    Args:
      files: the content of `tokenizer.json` and of those beside it that are kept, by name.
      end_of_text: its id.
      key: the configuration key to blame.

    Raises:
      ConfigError: not such a file, or ids that are too large.
    """

    def __init__(self, files: Mapping[str, bytes], end_of_text: int, key: str) -> None:
        self.files, self.end_of_text = dict(files), end_of_text
        self._documents = _library_tokenizer(files[TOKENIZER_FILE], key)
        self._documents.encode_special_tokens = True
        self._ids: dict[str, int] = self._documents.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        if not 0 <= end_of_text < self.vocab_size <= LARGEST_SIZE:
            rule = f"must have ids below {LARGEST_SIZE:,}, the end of text ({end_of_text}) among them"
            raise ConfigError(f"{key} {rule}, but has {self.vocab_size:,}")

    @classmethod
    def from_folder(cls, folder: Path, key: str, end_of_text: int | None = None) -> "HuggingFaceTokenizer":
        """Reads a folder.

        Args:
          end_of_text: its id; None: as the files of the folder name it.

        Raises:
          ConfigError: a file is missing or damaged, or none of them names an end of text.
        """
        where = f"{key} ({shown(folder)})"
        if not (folder / TOKENIZER_FILE).is_file():
            other = "; gpt2:FOLDER reads vocabulary and merges" if (folder / "merges.txt").exists() else ""
            raise ConfigError(f"{where} must be a folder with a {TOKENIZER_FILE}{other}")
        try:
            files = {name: inputs.read(folder / name) for name in KEPT_FILES if (folder / name).is_file()}
            others = {name: inputs.read(folder / name) for name in _MODEL_FILES if (folder / name).is_file()}
        except OSError as error:
            raise ConfigError(f"{where} must be a readable folder: {error.strerror}") from None
        if end_of_text is None:
            end_of_text = _find_end_of_text(files, others, where)
        return cls(files, end_of_text, where)

    @property
    def name(self) -> str:
        return f"Hugging Face, {self.vocab_size:,} tokens"

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.files[TOKENIZER_FILE]).hexdigest()
        return f"huggingface-{self.vocab_size}-{digest[:16]}-eot-{self.end_of_text}"

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, uint32, shape (num_tokens,). Raises `ConfigError` for what UTF-8 cannot hold."""
        return self._encode(self._documents, text, add_special_tokens=False)

    def markup(self, text: str) -> np.ndarray:
        """Ids of a text in which the names of special tokens are these tokens."""
        return self._encode(self._prompts, text, add_special_tokens=False)

    def prompt(self, text: str) -> np.ndarray:
        """Ids of the beginning of a document, as `tokenizer.json` begins one; an end of text if that is empty."""
        ids = self._encode(self._prompts, text, add_special_tokens=True)
        return ids if len(ids) else np.array([self.end_of_text], np.uint32)

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids; ends of text become blank lines, other special tokens nothing."""
        ids = np.asarray(ids)
        parts = np.split(ids, np.flatnonzero(ids == self.end_of_text))
        return "\n\n".join(self._documents.decode(part.tolist(), skip_special_tokens=True) for part in parts)

    @cached_property
    def _prompts(self) -> Any:
        return _library_tokenizer(self.files[TOKENIZER_FILE], TOKENIZER_FILE)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; none for special tokens, and for an id without a token."""
        facts: Any = strict_json.parse(self.files[TOKENIZER_FILE])
        added = {each["id"]: each for each in facts.get("added_tokens", [])}
        is_byte_level = "ByteLevel" in _kinds(facts.get("decoder"))
        table = [b""] * self.vocab_size
        for token, index in self._ids.items():
            if index in added:
                table[index] = b"" if added[index].get("special") else token.encode()
            elif is_byte_level:
                table[index] = bytes_of(token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                table[index] = bytes([int(token[3:-1], 16)])
            else:
                table[index] = token.replace("\u2581", " ").encode()
        return table

    def save(self, folder: Path) -> None:
        """Writes the files as they were read."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def _encode(self, tokenizer: Any, text: str, add_special_tokens: bool) -> np.ndarray:
        try:
            ids = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except UnicodeEncodeError as error:
            raise ConfigError(f"text ({text[error.start]!r} at {error.start}) must be valid Unicode") from None
        return np.array(ids, dtype=np.uint32)


def _library_tokenizer(content: bytes, where: str) -> Any:
    """The tokenizer of a `tokenizer.json`, which neither cuts nor fills up a text."""
    import tokenizers

    try:
        strict_json.parse(content)
        made = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more special
        reason = one_line(" ".join(str(error).split()))
        raise ConfigError(f"{where} must hold a {TOKENIZER_FILE} of the library tokenizers: {reason}") from None
    made.no_truncation()
    made.no_padding()
    return made


def _find_end_of_text(files: Mapping[str, bytes], others: Mapping[str, bytes], where: str) -> int:
    """By the name in the files of the tokenizer, or else by the id in those of the model; of several the first."""
    ids: dict[str, int] = _library_tokenizer(files[TOKENIZER_FILE], where).get_vocab(with_added_tokens=True)
    try:
        for name in _NAMING_FILES:
            named: Any = strict_json.parse(files[name]) if name in files else {}
            token = named.get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token in ids:
                return ids[token]
        for content in others.values():
            of_model: Any = strict_json.parse(content)
            found = of_model.get("eos_token_id")
            if found is not None:
                return int(found[0] if isinstance(found, list) else found)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{where} must hold whole JSON files: {one_line(str(error))}") from None
    raise ConfigError(f"{where} must name its end of text: eos_token in tokenizer_config.json")


def _kinds(part: Any) -> set[str]:
    """The types of a part of `tokenizer.json`, which may be a sequence of parts."""
    if not isinstance(part, dict):
        return set()
    inner = [_kinds(each) for key in ("decoders", "pretokenizers") for each in part.get(key, [])]
    return {part.get("type", "")}.union(*inner)

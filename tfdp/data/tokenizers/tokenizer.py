"""Text to token ids and back. No TensorFlow here: ids are numpy arrays.

A tokenizer is named by a string:

    bytes                  one token per UTF-8 byte
    bpe:SIZE               byte-level BPE of that many tokens, trained on the text itself
    bpe:FOLDER             one that was trained so: vocabulary.json and merges.txt
    gpt2:FOLDER            GPT-2's own vocabulary and merges, or others of its form
    sentencepiece:FILE     a SentencePiece model
    huggingface:FOLDER     the tokenizer.json of a Hugging Face folder, with its special tokens
"""

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Protocol

import numpy as np

from tfdp.data import inputs, strict_json
from tfdp.data.tokenizers import bpe
from tfdp.data.tokenizers.hugging_face import HuggingFaceTokenizer
from tfdp.data.tokenizers.sentence_piece import MODEL_FILE, SentencePieceTokenizer
from tfdp.system.exits import ConfigError
from tfdp.system.messages import shown

FORMS = "bytes, bpe:SIZE, bpe:FOLDER, gpt2:FOLDER, sentencepiece:FILE or huggingface:FOLDER"
KIND_FILE = "tokenizer.tfdp.json"


class Tokenizer(Protocol):
    """What training needs of a tokenizer."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int:
        """The id that stands before, between and after documents, and for nothing else."""
        ...

    @property
    def fingerprint(self) -> str:
        """A text that differs between tokenizers which give different ids."""
        ...

    @property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; none for the end of text."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, shape (num_tokens,), without end-of-text tokens."""
        ...

    def decode(self, ids: np.ndarray) -> str: ...


def prompt_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of the beginning of a document, which generation continues: an end of text, and the text.

    A tokenizer of Hugging Face begins a document in its own way, which its `prompt` knows.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.prompt(text)
    return np.array([tokenizer.end_of_text, *tokenizer.encode(text).tolist()])


def markup_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a text in which the names of special tokens are these tokens, as in what a chat template writes."""
    return tokenizer.markup(text) if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer.encode(text)


class ByteTokenizer:
    """One token per UTF-8 byte; vocabulary 256.

    The byte 0xFF never occurs in UTF-8, so its id is free to be the end of text.
    """

    name = "bytes"
    vocab_size = 256
    end_of_text = 0xFF
    fingerprint = "bytes-256-eot-255"
    token_bytes = [*(bytes([byte]) for byte in range(255)), b""]

    def encode(self, text: str) -> np.ndarray:
        """UTF-8 bytes of a text, uint8, shape (num_bytes,). Raises `ConfigError` for what UTF-8 cannot hold."""
        try:
            return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        except UnicodeEncodeError as error:
            raise ConfigError(f"text ({text[error.start]!r} at {error.start}) must be valid Unicode") from None

    def decode(self, ids: np.ndarray) -> str:
        """Text of byte ids; ends of text become blank lines, broken UTF-8 the replacement character."""
        data = bytes(np.asarray(ids, dtype=np.uint8))
        return data.replace(b"\xff", b"\n\n").decode("utf-8", errors="replace")


def make_tokenizer(name: str, key: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer of a name, from its files. Raises `ConfigError`, for bpe:SIZE too, which needs a text first."""
    kind, _, address = name.partition(":")
    if name == "bytes":
        return ByteTokenizer()
    if address and size_to_train(name) is None:
        path = inputs.path_of(address)
        if kind in ("bpe", "gpt2") and os.path.lexists(path / KIND_FILE):
            return open_tokenizer(path, key)
        if kind in ("bpe", "gpt2"):
            return bpe.load(path, "keras" if kind == "bpe" else "gpt2", key)
        if kind == "sentencepiece":
            return SentencePieceTokenizer.from_file(path, key)
        if kind == "huggingface":
            return HuggingFaceTokenizer.from_folder(path, key)
    raise ConfigError(f"{key} ({shown(name)}) must be one of {FORMS}")


def size_to_train(name: str) -> int | None:
    """The number of tokens of bpe:SIZE; None for a tokenizer that exists. Raises `ConfigError` for a wrong number."""
    kind, _, address = name.partition(":")
    if kind != "bpe" or not (address.isascii() and address.isdigit()):
        return None
    return bpe.checked_size(address)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes what `open_tokenizer` reads; the folder appears whole or not at all, and an existing one stays."""
    if folder.exists():
        return
    scratch = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    scratch.mkdir(parents=True)
    try:
        kind: dict[str, object] = {"kind": "bytes"}
        if isinstance(tokenizer, bpe.BytePairTokenizer):
            tokenizer.save(scratch)
            kind = {"kind": "bpe", "pattern": tokenizer.pattern}
        elif isinstance(tokenizer, SentencePieceTokenizer):
            tokenizer.save(scratch)
            kind = {"kind": "sentencepiece"}
        elif isinstance(tokenizer, HuggingFaceTokenizer):
            tokenizer.save(scratch)
            kind = {"kind": "huggingface", "end_of_text": tokenizer.end_of_text}
        (scratch / KIND_FILE).write_text(json.dumps(kind))
        os.rename(scratch, folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def open_tokenizer(folder: Path, key: str = "tokenizer") -> Tokenizer:
    """Reads what `save_tokenizer` wrote. Raises `ConfigError` for a folder that is not such."""
    where = f"{key} ({shown(folder)})"
    try:
        told = strict_json.parse(inputs.read(folder / KIND_FILE))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{where} must be a tokenizer that tfdp wrote, but {KIND_FILE}: {reason}") from None
    kind, pattern = (told.get("kind"), told.get("pattern")) if isinstance(told, dict) else (None, None)
    if kind == "bpe" and pattern in list(bpe.PATTERNS):
        return bpe.load(folder, pattern, key)
    if kind == "sentencepiece":
        return SentencePieceTokenizer.from_file(folder / MODEL_FILE, key)
    if kind == "huggingface" and isinstance(told, dict) and isinstance(told.get("end_of_text"), int):
        return HuggingFaceTokenizer.from_folder(folder, key, told["end_of_text"])
    if kind == "bytes":
        return ByteTokenizer()
    raise ConfigError(f"{where} must be a tokenizer that tfdp wrote, but {KIND_FILE} names none that there is")

"""Text to token ids and back. No TensorFlow here: ids are numpy arrays."""

from typing import Protocol

import numpy as np

from tfdp.exits import ConfigError


class Tokenizer(Protocol):
    """What training needs of a tokenizer."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int:
        """The id that stands before, between and after documents."""
        ...

    @property
    def fingerprint(self) -> str:
        """A text that differs between tokenizers which give different ids."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, shape (num_tokens,), without end-of-text tokens."""
        ...

    def decode(self, ids: np.ndarray) -> str: ...


class ByteTokenizer:
    """One token per UTF-8 byte; vocabulary 256.

    The byte 0xFF never occurs in UTF-8, so its id is free to be the end of text.
    """

    name = "bytes"
    vocab_size = 256
    end_of_text = 0xFF
    fingerprint = "bytes-256-eot-255"

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


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`."""
    if name == "bytes":
        return ByteTokenizer()
    raise ConfigError(f"data.tokenizer ({name}) must be one of bytes")

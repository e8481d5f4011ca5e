"""SentencePiece models (Kudo and Richardson 2018), read from a .model file."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tfdp.data import inputs
from tfdp.system.exits import ConfigError
from tfdp.system.messages import one_line, shown

MODEL_FILE = "sentencepiece.model"


class SentencePieceTokenizer:
    """A SentencePiece model; its end of sentence (`</s>`) is the end of text.

    Such a model may change a text before it cuts it (its own Unicode and white space rules), and may know no piece for
    a character: what it decodes is then not what was encoded. Bits per byte count the bytes of the text as it was.

    Args:
      model: the content of a .model file.
      key: the configuration key to blame.

    Raises:
      ConfigError: not such a model, or one without an end of sentence.
    """

    def __init__(self, model: bytes, key: str) -> None:
        import sentencepiece

        self._model = model
        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            self.vocab_size = int(self._processor.vocab_size())
            self._pieces = [self._processor.IdToPiece(index) for index in range(self.vocab_size)]
        except UnicodeDecodeError as error:  # in a piece, or in the library's message on one
            raise ConfigError(f"{key} must be a SentencePiece model with pieces of UTF-8: {error.reason}") from None
        except RuntimeError as error:
            reason = one_line(" ".join(str(error).split()))
            raise ConfigError(f"{key} must be a SentencePiece model: {reason}") from None
        self.end_of_text = int(self._processor.eos_id())
        if self.end_of_text < 0:
            raise ConfigError(f"{key} must be a SentencePiece model with an end of sentence: train it with --eos_id")

    @classmethod
    def from_file(cls, path: Path, key: str) -> "SentencePieceTokenizer":
        where = f"{key} ({shown(path)})"
        try:
            return cls(inputs.read(path), where)
        except OSError as error:
            raise ConfigError(f"{where} must be a readable SentencePiece model: {error.strerror}") from None

    @property
    def name(self) -> str:
        return f"SentencePiece, {self.vocab_size:,} tokens"

    @cached_property
    def fingerprint(self) -> str:
        return f"sentencepiece-{self.vocab_size}-{hashlib.sha256(self._model).hexdigest()[:16]}"

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32, shape (num_tokens,). Raises `ConfigError` for what UTF-8 cannot hold."""
        try:
            return np.array(self._processor.EncodeAsIds(text), dtype=np.int32)
        except UnicodeEncodeError as error:
            raise ConfigError(f"text ({text[error.start]!r} at {error.start}) must be valid Unicode") from None

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids; ends of text become blank lines."""
        ids = np.asarray(ids)
        parts = np.split(ids, np.flatnonzero(ids == self.end_of_text))
        return "\n\n".join(
            self._processor.DecodeIds([index for index in part.tolist() if index != self.end_of_text]) for part in parts
        )

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; none for control pieces."""
        processor = self._processor
        table = []
        for index, piece in enumerate(self._pieces):
            if processor.IsControl(index) or processor.IsUnknown(index):
                table.append(b"")
            elif processor.IsByte(index):
                table.append(bytes([int(piece[3:-1], 16)]))
            else:
                table.append(piece.replace("\u2581", " ").encode())
        return table

    def save(self, folder: Path) -> None:
        (folder / MODEL_FILE).write_bytes(self._model)

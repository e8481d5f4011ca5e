"""Token shards: a corpus, encoded once, as flat files that training reads by memory map.

A folder of shards holds, for the splits `train` and `validation`:

    manifest.json                what the folder was made from, the counts, and the sha256 of every .bin
    tokenizer/                   what the ids mean
    SPLIT-00000.bin ...          token ids, flat, little-endian uint16 or uint32
    SPLIT.documents.npy          index of the first token of each document, int64
    SPLIT.documents.jsonl        name of each document, a JSON string a line

The ids of a split are one stream: end-of-text, document, end-of-text, document, ..., end-of-text. So every
byte of every document is predicted once an epoch, the first one from an end-of-text token.

Reading leaves no page of a file in the memory of this process: a corpus of any size costs the same.
"""

import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tfdp.exits import ConfigError
from tfdp.tokenizer import Tokenizer, open_tokenizer

FORMAT_VERSION = 4
SPLITS = ("train", "validation")
MANIFEST_FILE, TOKENIZER_FOLDER = "manifest.json", "tokenizer"
TOKENS_PER_SHARD = 1 << 28
ABSENT = -1  # stands where a window reaches past the end of its split; no token id is negative
_CHUNK_TOKENS = 1 << 16  # whose bytes and their indices fit into a processor's cache


class MappedTokens:
    """A file of token ids, memory-mapped; `release` gives the pages that were touched back."""

    def __init__(self, path: Path, dtype: str) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else None
        self.ids = np.frombuffer(self._map or b"", dtype=dtype)
        if self._map is not None:
            self._map.madvise(mmap.MADV_RANDOM)

    def release(self) -> None:
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


class Split:
    """The tokens of one split: `num_tokens` ids that encode `num_bytes` bytes of text.

    Args:
      shards: the token ids, in parts: arrays, or files.
      num_documents, num_bytes: of text.
      index: the files of the documents' starts and names; None for tokens whose documents nobody asks for.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray | MappedTokens],
        num_documents: int,
        num_bytes: int,
        index: tuple[Path, Path] | None = None,
    ) -> None:
        self._mapped = [shard for shard in shards if isinstance(shard, MappedTokens)]
        self._shards = [shard.ids if isinstance(shard, MappedTokens) else shard for shard in shards]
        self._index = index
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards])
        self.num_tokens = int(self._starts[-1])
        self.num_documents = num_documents
        self.num_bytes = num_bytes

    def read(self, starts: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
        """Reads stretches of tokens: int32, shape (len(starts), width), `ABSENT` after the end of each.

        Args:
          starts: index of the first token of each.
          lengths: tokens of each, at most `width`; what lies past the end of the split is absent too.
          width: of the result.
        """
        rows = np.full((len(starts), width), ABSENT, dtype=np.int32)
        for row, start, length in zip(rows, starts.tolist(), lengths.tolist(), strict=True):
            self._copy(start, row[:length])
        for mapped in self._mapped:
            mapped.release()
        return rows

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Index of the first token of each document, int64, memory-mapped."""
        assert self._index is not None, "a split without an index does not know its documents"
        return np.load(self._index[0], mmap_mode="r")

    @property
    def largest_document(self) -> int:
        """Tokens of the largest document, without its end of text."""
        return int(np.diff(self.document_starts, append=self.num_tokens).max(initial=1)) - 1

    def documents_between(self, begin: int, stop: int) -> list[str]:
        """The names of the documents that have a token in [begin, stop), in order; ends of text belong to none."""
        assert self._index is not None, "a split without an index does not know its documents"
        starts = self.document_starts
        first = max(0, int(np.searchsorted(starts, begin, side="right")) - 1)
        last = int(np.searchsorted(starts, stop, side="left"))
        next_starts = np.append(starts[first + 1 : last + 1], self.num_tokens)[: last - first]
        touched = np.maximum(starts[first:last], begin) < next_starts - 1  # the last token before them ends the text
        with self._index[1].open(encoding="utf-8") as lines:
            return [
                json.loads(line) for line, wanted in zip(islice(lines, first, last), touched, strict=True) if wanted
            ]

    def byte_chunks(
        self, token_bytes: Sequence[bytes], begin: int, stop: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the text of some tokens as bytes, with the index of the first byte of each document in it.

        A chunk repeats the last tokens before it, so that no 50 bytes of a document lie in none.
        """
        sizes = np.array([len(data) for data in token_bytes], dtype=np.int32)
        flat = np.frombuffer(b"".join(token_bytes), dtype=np.uint8)
        offsets = np.cumsum(sizes, dtype=np.int32) - sizes
        for start in range(begin, stop, _CHUNK_TOKENS):
            first, end = max(0, start - 64), min(start + _CHUNK_TOKENS, stop)
            (ids,) = self.read(np.array([first]), np.array([end - first]), end - first)
            lengths = sizes[ids]
            ends = np.cumsum(lengths, dtype=np.int32)
            positions = np.repeat(offsets[ids] - (ends - lengths), lengths)
            positions += np.arange(len(positions), dtype=np.int32)
            yield flat[positions], ends[lengths == 0]  # the only token without bytes ends a text

    def _copy(self, start: int, row: np.ndarray) -> None:
        stop = min(start + len(row), self.num_tokens)
        position = start
        while position < stop:
            shard = int(np.searchsorted(self._starts, position, side="right")) - 1
            end = min(stop, int(self._starts[shard + 1]))
            offset = int(self._starts[shard])
            row[position - start : end - start] = self._shards[shard][position - offset : end - offset]
            position = end


@dataclass(frozen=True)
class TokenShards:
    """The splits of one corpus under one tokenizer."""

    train: Split
    validation: Split
    tokenizer: Tokenizer
    corpus_sha256: str  # of the text
    split_sha256: str  # of the token ids of both splits

    def describe(self) -> str:
        """Documents and tokens of both splits, for people."""
        parts = [(name, getattr(self, name)) for name in SPLITS]
        return "; ".join(
            f"{name} {split.num_documents:,} documents, {split.num_tokens:,} tokens" for name, split in parts
        )


def open_shards(folder: Path, key: str = "data") -> TokenShards:
    """Memory-maps a complete folder of shards. Raises `ConfigError` for one that is not, naming `key`."""
    if not is_complete(folder):
        raise ConfigError(f"{key} ({folder}) must be a complete folder of token shards: prepare it again")
    manifest = read_manifest(folder)
    splits = {}
    for name in SPLITS:
        entry = manifest["splits"][name]
        shards = [MappedTokens(folder / shard["file"], manifest["dtype"]) for shard in entry["shards"]]
        splits[name] = Split(shards, entry["num_documents"], entry["num_bytes"], _index_files(folder, name))
    digests = {name: [shard["sha256"] for shard in manifest["splits"][name]["shards"]] for name in SPLITS}
    split_sha256 = hashlib.sha256(json.dumps([manifest["dtype"], digests]).encode()).hexdigest()
    tokenizer = open_tokenizer(folder / TOKENIZER_FOLDER, key)
    return TokenShards(splits["train"], splits["validation"], tokenizer, manifest["corpus_sha256"], split_sha256)


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))


def is_complete(folder: Path) -> bool:
    """Whether the manifest is there and every file that it lists has its length."""
    try:
        manifest = read_manifest(folder)
        width = np.dtype(manifest["dtype"]).itemsize
        splits = [manifest["splits"][name] for name in SPLITS]
        lengths = [(shard["file"], shard["num_tokens"] * width) for split in splits for shard in split["shards"]]
        lengths += [(part["file"], part["num_bytes"]) for split in splits for part in split["index"]]
        return manifest["version"] == FORMAT_VERSION and all(
            (folder / file).stat().st_size == length for file, length in lengths
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


class SplitWriter:
    """Appends documents to the files of one split.

    Args:
      folder: of the shards.
      name: of the split.
      dtype: of the ids.
      end_of_text: the id between documents.
    """

    def __init__(self, folder: Path, name: str, dtype: str, end_of_text: int) -> None:
        self._folder, self._name, self.dtype = folder, name, dtype
        self._starts: list[np.ndarray] = []
        self._num_documents = self._num_bytes = self._num_tokens = self._num_in_shard = 0
        self._shards: list[dict[str, Any]] = []
        self._file, self._digest = (folder / self._shard_name()).open("wb"), hashlib.sha256()
        _, names_path = _index_files(folder, name)
        self._names = names_path.open("w", encoding="utf-8")
        self._append(np.array([end_of_text], dtype=dtype))

    def add(self, ids: np.ndarray, lengths: np.ndarray, names: Sequence[str], num_bytes: int) -> None:
        """Appends documents.

        Args:
          ids: of all of them, an end of text after each.
          lengths: tokens of each, without the end of text.
          names: of each.
          num_bytes: of their text together.
        """
        assert len(ids) == int((lengths + 1).sum()), "each document has its tokens and one end of text"
        self._starts.append(self._num_tokens + np.cumsum(lengths + 1) - (lengths + 1))
        self._names.writelines(json.dumps(name) + "\n" for name in names)
        self._num_documents += len(names)
        self._num_bytes += num_bytes
        self._append(ids)

    def finish(self) -> dict[str, Any]:
        """Closes the files and returns the split's part of the manifest."""
        self._close_shard()
        self._names.close()
        starts_path, names_path = _index_files(self._folder, self._name)
        np.save(starts_path, np.concatenate([*self._starts, np.zeros(0, np.int64)]))
        return {
            "num_tokens": self._num_tokens,
            "num_bytes": self._num_bytes,
            "num_documents": self._num_documents,
            "shards": self._shards,
            "index": [{"file": path.name, "num_bytes": path.stat().st_size} for path in (starts_path, names_path)],
        }

    def _append(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._num_in_shard == TOKENS_PER_SHARD:
                self._close_shard()
                self._file, self._digest = (self._folder / self._shard_name()).open("wb"), hashlib.sha256()
            taken, ids = np.split(ids, [TOKENS_PER_SHARD - self._num_in_shard])
            data = np.ascontiguousarray(taken, dtype=self.dtype).data
            self._file.write(data)
            self._digest.update(data)
            self._num_in_shard += len(taken)
            self._num_tokens += len(taken)

    def _close_shard(self) -> None:
        self._file.close()
        self._shards.append(
            {"file": self._shard_name(), "num_tokens": self._num_in_shard, "sha256": self._digest.hexdigest()}
        )
        self._num_in_shard = 0

    def _shard_name(self) -> str:
        return f"{self._name}-{len(self._shards):05d}.bin"


def _index_files(folder: Path, name: str) -> tuple[Path, Path]:
    """The files of the starts and the names of a split's documents."""
    return folder / f"{name}.documents.npy", folder / f"{name}.documents.jsonl"

"""Token shards: a corpus, encoded once, as flat files that training reads by memory map.

A folder of shards holds, for the splits `train` and `validation`:

    manifest.json                what the folder was made from, the counts, and the sha256 of every file
    tokenizer/                   what the ids mean
    SPLIT-00000.bin ...          token ids, flat, little-endian uint16 or uint32
    SPLIT.documents.npy          index of the first token of each document, int64
    SPLIT.documents.jsonl        name of each document, a JSON string a line
    verified.json                which of these files were found to be what the manifest says

The ids of a split are one stream: end-of-text, document, end-of-text, document, ..., end-of-text. So every
byte of every document is predicted once an epoch, the first one from an end-of-text token.

Opening verifies every file (`verification.py`), and `open_shards` is the only way to open: for a run, an evaluation,
the cache and `prepare`. So the digest that workers and checkpoints compare is that of the tokens that are read. Reading
leaves no page of a file in the memory of this process: a corpus of any size costs the same.
"""

import hashlib
import io
import json
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from tfdp.data.manifest import MANIFEST_FILE, SPLITS, TOKENIZER_FOLDER, Manifest, SplitFacts
from tfdp.data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from tfdp.data.verification import Damaged, Finding, check_lengths, examine, verify
from tfdp.system.exits import ConfigError
from tfdp.tasks.flags import ID_MASK

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
      index: the files of the documents' starts and names; None for tokens without documents.
      has_flags: whether the ids carry flags (`tfdp/tasks/flags.py`): those of examples do.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray | MappedTokens],
        num_documents: int,
        num_bytes: int,
        index: tuple[Path, Path] | None = None,
        has_flags: bool = False,
    ) -> None:
        self._mapped = [shard for shard in shards if isinstance(shard, MappedTokens)]
        self._shards = [shard.ids if isinstance(shard, MappedTokens) else shard for shard in shards]
        self._index = index
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards])
        self.num_tokens = int(self._starts[-1])
        self.num_documents = num_documents
        self.num_bytes = num_bytes
        self.has_flags = has_flags

    def read(self, starts: np.ndarray, lengths: np.ndarray, width: int, with_flags: bool = False) -> np.ndarray:
        """Reads ranges of tokens: int32, shape (len(starts), width), `ABSENT` after the end of each.

        Args:
          starts: index of the first token of each.
          lengths: tokens of each, at most `width`; what lies past the end of the split is absent too.
          width: of the result.
          with_flags: whether ids keep the flags that they carry.
        """
        rows = np.full((len(starts), width), ABSENT, dtype=np.int32)
        for row, start, length in zip(rows, starts.tolist(), lengths.tolist(), strict=True):
            self._copy(start, row[:length])
        for mapped in self._mapped:
            mapped.release()
        if self.has_flags and not with_flags:
            rows[rows >= 0] &= ID_MASK
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


class DamagedShards(ConfigError):
    """A folder of shards is not what was written."""


def note(line: str) -> None:
    """A line for people, beside what a command prints."""
    print(line, file=sys.stderr, flush=True)


def open_shards(
    folder: Path, key: str = "data", cache_dir: Path | None = None, say: Callable[[str], None] = note
) -> TokenShards:
    """Memory-maps a folder of shards, once its files are verified.

    Args:
      folder: that `tfdp.prepare` made.
      key: the configuration key that names it, for errors.
      cache_dir: where to record that it was verified, if the folder cannot be written.
      say: called before a long verification.

    Raises:
      DamagedShards: a file is missing or not what was written, or holds an id that the tokenizer does not have.
      ConfigError: a file cannot be read.
    """
    try:
        manifest = _read_manifest(folder)
        tokenizer = _open_tokenizer(folder, manifest, key)
        has_digest = [file for file in manifest.files if file.sha256 is not None]
        check_lengths(folder, manifest.files)
        _check_ids(folder, manifest, verify(folder, has_digest, cache_dir, say), tokenizer)
        splits = {name: _open_split(folder, name, manifest) for name in SPLITS}
    except Damaged as error:
        raise _damaged(folder, key, error) from None
    except OSError as error:
        raise ConfigError(f"{key} ({folder}) must be a folder that can be read: {error}") from None
    digests = {name: [shard.sha256 for shard in manifest.splits[name].shards] for name in SPLITS}
    split_sha256 = hashlib.sha256(json.dumps([manifest.dtype, digests]).encode()).hexdigest()
    return TokenShards(splits["train"], splits["validation"], tokenizer, manifest.corpus_sha256, split_sha256)


def open_tokenizer_of(folder: Path, key: str) -> Tokenizer:
    """The tokenizer of a folder of shards, without reading the shards. Raises as `open_shards` does."""
    try:
        return _open_tokenizer(folder, _read_manifest(folder), key)
    except Damaged as error:
        raise _damaged(folder, key, error) from None


def _damaged(folder: Path, key: str, error: Damaged) -> DamagedShards:
    return DamagedShards(f"{key} ({folder}) must be a complete folder of token shards, but {error}: prepare it again")


def _read_manifest(folder: Path) -> Manifest:
    try:
        return Manifest.read(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{MANIFEST_FILE} is missing") from None
    except ValueError as error:
        raise Damaged(f"{MANIFEST_FILE} is damaged ({error})") from None


def _open_tokenizer(folder: Path, manifest: Manifest, key: str) -> Tokenizer:
    check_lengths(folder, manifest.tokenizer_files)
    for file in manifest.tokenizer_files:  # a megabyte at most: read each time
        examine(folder / file.name, file)
    tokenizer = open_tokenizer(folder / TOKENIZER_FOLDER, key)
    if tokenizer.fingerprint != manifest.tokenizer:
        raise Damaged(f"{TOKENIZER_FOLDER}/ holds {tokenizer.fingerprint}, and the ids are of {manifest.tokenizer}")
    return tokenizer


def _check_ids(folder: Path, manifest: Manifest, findings: dict[str, Finding], tokenizer: Tokenizer) -> None:
    """Raises `Damaged` where a shard holds an id that the tokenizer does not have."""
    for split in manifest.splits.values():
        for shard in split.shards:
            if (findings[shard.name].max_id or 0) >= tokenizer.vocab_size:
                ids = MappedTokens(folder / shard.name, manifest.dtype).ids
                ids = ids & ID_MASK if shard.has_flags else ids
                index = next(_above(ids, tokenizer.vocab_size))
                raise Damaged(
                    f"{shard.name} holds the id {ids[index]} at index {index:,}, and the vocabulary has "
                    f"{tokenizer.vocab_size:,} ids"
                )


def _above(ids: np.ndarray, limit: int) -> Iterator[int]:
    """The indices of ids that are not below `limit`."""
    for start in range(0, len(ids), _CHUNK_TOKENS):
        yield from (start + np.flatnonzero(ids[start : start + _CHUNK_TOKENS] >= limit)).tolist()


def _open_split(folder: Path, name: str, manifest: Manifest) -> Split:
    facts, index = manifest.splits[name], index_files(folder, name)
    if any(file.sha256 is None for file in facts.index):
        _check_index(index, facts)
    shards = [MappedTokens(folder / shard.name, manifest.dtype) for shard in facts.shards]
    return Split(shards, facts.num_documents, facts.num_bytes, index, manifest.has_flags)


def _check_index(index: tuple[Path, Path], facts: SplitFacts) -> None:
    """Raises `Damaged` for index files without a digest (version 4) that cannot be those of a split."""
    starts_path, names_path = index
    header = io.BytesIO()
    shape = (facts.num_documents,)
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": shape})
    with starts_path.open("rb") as file:  # compared as it is written: numpy reads a header as a literal of Python
        if file.read(len(header.getvalue())) != header.getvalue():
            raise Damaged(f"{starts_path.name} is not an array of {facts.num_documents:,} starts")
    starts = np.load(starts_path, mmap_mode="r")
    if len(starts) and (starts[0] != 1 or starts[-1] >= facts.num_tokens or np.any(np.diff(starts) < 1)):
        raise Damaged(f"{starts_path.name} must begin with 1, ascend and end before {facts.num_tokens:,}")
    try:
        with names_path.open(encoding="utf-8") as lines:
            are_names = [isinstance(json.loads(line), str) for line in lines]
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{names_path.name} must hold a JSON string in each line ({error})") from None
    if len(are_names) != facts.num_documents or not all(are_names):
        raise Damaged(f"{names_path.name} must hold the names of {facts.num_documents:,} documents")


def index_files(folder: Path, name: str) -> tuple[Path, Path]:
    """The files of the starts and the names of a split's documents."""
    return folder / f"{name}.documents.npy", folder / f"{name}.documents.jsonl"

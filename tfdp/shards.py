"""Token shards: a corpus, encoded once, as flat files that training reads by memory map.

A folder of shards holds, for the splits `train` and `validation`:

    manifest.json                what the folder was made from, the counts, and the sha256 of every .bin
    SPLIT-00000.bin ...          token ids, flat, little-endian uint16 or uint32
    SPLIT.documents.npy          index of the first token of each document, int64
    SPLIT.documents.jsonl        name of each document, a JSON string a line

The ids of a split are one stream: end-of-text, document, end-of-text, document, ..., end-of-text. So every
byte of every document is predicted once an epoch, the first one from an end-of-text token.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from tfdp.config import DataConfig
from tfdp.corpus import Document, documents
from tfdp.exits import ConfigError
from tfdp.tokenizer import Tokenizer

FORMAT_VERSION = 3
SPLITS = ("train", "validation")
TOKENS_PER_SHARD = 1 << 28
ABSENT = -1  # stands where a window reaches past the end of its split; no token id is negative


class Split:
    """The tokens of one split, memory-mapped: `num_tokens` ids that encode `num_bytes` bytes of text.

    Args:
      shards: the token ids, in parts.
      num_documents, num_bytes: of text.
      index: the files of the documents' starts and names; None for tokens whose documents nobody asks for.
    """

    def __init__(
        self, shards: Sequence[np.ndarray], num_documents: int, num_bytes: int, index: tuple[Path, Path] | None = None
    ) -> None:
        self._shards, self._index = shards, index
        self._starts = np.cumsum([0] + [len(shard) for shard in shards])
        self.num_tokens = int(self._starts[-1])
        self.num_documents = num_documents
        self.num_bytes = num_bytes

    def num_sequences(self, context_length: int) -> int:
        """Windows of context_length + 1 tokens that together predict every token but the first, once each."""
        return max(0, -(-(self.num_tokens - 1) // context_length))

    def windows(self, indices: np.ndarray, context_length: int) -> np.ndarray:
        """Reads windows by index: int32, shape (len(indices), context_length + 1), `ABSENT` past the end.

        Window w starts at token w * context_length: neighbours share one token, which is the last target of
        one and the first input of the other.
        """
        rows = np.full((len(indices), context_length + 1), ABSENT, dtype=np.int32)
        for row, index in zip(rows, indices, strict=True):
            self._read(int(index) * context_length, row)
        return rows

    def documents_of(self, window: int, context_length: int) -> list[str]:
        """The names of the documents that have a token in a window, in order; ends of text belong to none.

        Each call reads the index from the disk; nothing of it is kept.
        """
        assert self._index is not None, "a split without an index does not know its documents"
        starts_file, names_file = self._index
        starts = np.load(starts_file, mmap_mode="r")
        begin, stop = window * context_length, (window + 1) * context_length + 1
        first = max(0, int(np.searchsorted(starts, begin, side="right")) - 1)
        last = int(np.searchsorted(starts, stop, side="left"))
        next_starts = np.append(starts[first + 1 : last + 1], self.num_tokens)[: last - first]
        touched = np.maximum(starts[first:last], begin) < next_starts - 1  # the last token before them ends the text
        with names_file.open(encoding="utf-8") as lines:
            return [
                json.loads(line) for line, wanted in zip(islice(lines, first, last), touched, strict=True) if wanted
            ]

    def _read(self, start: int, row: np.ndarray) -> None:
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
    corpus_sha256: str
    split_sha256: str  # of the text, the tokenizer, and which document is in which split

    def describe(self) -> str:
        """Documents and tokens of both splits, for people."""
        parts = [(name, getattr(self, name)) for name in SPLITS]
        return "; ".join(
            f"{name} {split.num_documents:,} documents, {split.num_tokens:,} tokens" for name, split in parts
        )


def open_or_prepare(config: DataConfig, tokenizer: Tokenizer, cache_dir: Path) -> TokenShards:
    """Opens the shards of a corpus in `cache_dir`, or makes them there first.

    The folder's name is a digest of the text itself, the tokenizer and the split, so a changed file or key
    makes other shards, and two runs at once cannot harm each other: the first one to finish gives the folder.

    Raises:
      ConfigError: the source is wrong or empty.
    """
    corpus_sha256, validation_names = _survey(config)
    recipe = json.dumps([corpus_sha256, tokenizer.fingerprint, sorted(validation_names)])
    split_sha256 = hashlib.sha256(recipe.encode()).hexdigest()
    folder = cache_dir / f"{split_sha256[:32]}.{FORMAT_VERSION}"
    if not _is_complete(folder):
        scratch = cache_dir / f"{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            scratch.mkdir(parents=True)
            _write(config, tokenizer, validation_names, (corpus_sha256, split_sha256), scratch)
            _publish(scratch, folder)
        except OSError as error:
            raise ConfigError(f"data.cache_dir ({cache_dir}) must be a folder that can be written: {error}") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return open_shards(folder)


def open_shards(folder: Path) -> TokenShards:
    """Memory-maps a complete folder of shards. Raises `ConfigError` for one that is not."""
    if not _is_complete(folder):
        raise ConfigError(f"data ({folder}) must be a complete folder of token shards: prepare it again")
    manifest = json.loads((folder / "manifest.json").read_text())
    splits = {}
    for name in SPLITS:
        entry = manifest["splits"][name]
        shards = [np.memmap(folder / shard["file"], dtype=manifest["dtype"], mode="r") for shard in entry["shards"]]
        splits[name] = Split(shards, entry["num_documents"], entry["num_bytes"], _index_files(folder, name))
    return TokenShards(splits["train"], splits["validation"], manifest["corpus_sha256"], manifest["split_sha256"])


# ---------------------------------------------------------------------------------------------------
# Choosing the split
# ---------------------------------------------------------------------------------------------------


def _survey(config: DataConfig) -> tuple[str, set[str]]:
    """Reads a corpus once: its sha256, and the names of the documents held out for validation.

    Documents are held out by the hash of their names, so the split depends neither on a seed nor on the order
    of files. With one document alone nothing is held out by name: `_split_documents` then cuts that document.
    """
    digest = hashlib.sha256()
    sizes: dict[str, int] = {}
    for document in documents(config.source):
        _digest_document(digest, document)
        sizes[document.name] = len(document.text.encode())
    held_out: set[str] = set()
    if config.validation_source is not None:
        digest.update(b"validation")
        for document in documents(config.validation_source, "data.validation_source"):
            _digest_document(digest, document)
    elif sum(size > 0 for size in sizes.values()) > 1:
        held_out = _hold_out(sizes, config.validation_fraction)
    else:
        digest.update(repr(config.validation_fraction).encode())
    return digest.hexdigest(), held_out


def _hold_out(sizes: dict[str, int], fraction: float) -> set[str]:
    """Takes documents by the hash of their names, each that still fits into the fraction of all bytes; at least one."""
    ranked = sorted((name for name in sizes if sizes[name]), key=lambda name: hashlib.sha256(name.encode()).digest())
    left = fraction * sum(sizes.values())
    held_out: set[str] = set()
    for name in ranked:
        if sizes[name] <= left:
            held_out.add(name)
            left -= sizes[name]
    return held_out or {min(ranked, key=lambda name: sizes[name])} if ranked else set()


def _digest_document(digest: "hashlib._Hash", document: Document) -> None:
    text = document.text.encode()
    digest.update(f"{len(document.name)} {document.name} {len(text)} ".encode())
    digest.update(text)


def _split_documents(config: DataConfig, validation_names: set[str]) -> Iterator[tuple[str, Document]]:
    """Yields (split, document) in the order in which the shards hold them."""
    cut_single = config.validation_source is None and not validation_names
    for document in documents(config.source):
        if cut_single and document.text:
            yield from _cut_single_document(document, config.validation_fraction)
        else:
            yield ("validation" if document.name in validation_names else "train"), document
    if config.validation_source is not None:
        for document in documents(config.validation_source, "data.validation_source"):
            yield "validation", document


def _cut_single_document(document: Document, validation_fraction: float) -> Iterator[tuple[str, Document]]:
    """Cuts a corpus that is one document, at the last line break before its validation part."""
    cut = round(len(document.text) * (1.0 - validation_fraction))
    near = cut - (len(document.text) - cut) // 2  # no line break for long: cut inside the line
    cut = document.text.rfind("\n", near, cut) + 1 or cut
    yield "train", Document(document.name, document.text[:cut])
    yield "validation", Document(document.name, document.text[cut:])


# ---------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------


class _SplitWriter:
    """Appends documents to the shard files of one split."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, end_of_text: int) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._end_of_text = np.array([end_of_text], dtype=dtype)
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self._document_starts: list[int] = []
        self._document_names: list[str] = []
        self._num_bytes = 0
        self._shards: list[dict[str, object]] = []
        self._num_written = 0
        self._append(self._end_of_text)

    def add(self, document: Document, ids: np.ndarray) -> None:
        self._document_starts.append(self._num_written + self._num_pending)
        self._document_names.append(document.name)
        self._num_bytes += len(document.text.encode())
        self._append(ids.astype(self._dtype))
        self._append(self._end_of_text)

    def finish(self) -> dict[str, object]:
        """Writes what is pending and returns the split's part of the manifest."""
        if self._num_pending:
            self._write_shard()
        starts, names = _index_files(self._folder, self._name)
        np.save(starts, np.array(self._document_starts, dtype=np.int64))
        with names.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(name) + "\n" for name in self._document_names)
        return {
            "num_tokens": self._num_written,
            "num_bytes": self._num_bytes,
            "num_documents": len(self._document_starts),
            "shards": self._shards,
            "index": [{"file": path.name, "num_bytes": path.stat().st_size} for path in (starts, names)],
        }

    def _append(self, ids: np.ndarray) -> None:
        self._pending.append(ids)
        self._num_pending += len(ids)
        if self._num_pending >= TOKENS_PER_SHARD:
            self._write_shard()

    def _write_shard(self) -> None:
        data = np.concatenate(self._pending).astype(self._dtype.newbyteorder("<")).tobytes()
        file = f"{self._name}-{len(self._shards):05d}.bin"
        (self._folder / file).write_bytes(data)
        self._shards.append({"file": file, "num_tokens": self._num_pending, "sha256": hashlib.sha256(data).hexdigest()})
        self._num_written += self._num_pending
        self._pending, self._num_pending = [], 0


def _write(
    config: DataConfig, tokenizer: Tokenizer, validation_names: set[str], digests: tuple[str, str], folder: Path
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    writers = {name: _SplitWriter(folder, name, dtype, tokenizer.end_of_text) for name in SPLITS}
    for split, document in _split_documents(config, validation_names):
        writers[split].add(document, tokenizer.encode(document.text))
    manifest = {
        "version": FORMAT_VERSION,
        "source": config.source,
        "validation_source": config.validation_source,
        "tokenizer": tokenizer.fingerprint,
        "corpus_sha256": digests[0],
        "split_sha256": digests[1],
        "dtype": dtype.newbyteorder("<").str,
        "splits": {name: writer.finish() for name, writer in writers.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _publish(scratch: Path, folder: Path) -> None:
    """Gives a finished folder its name; where another process was first, that one stays."""
    if folder.exists() and not _is_complete(folder):
        shutil.rmtree(folder)
    try:
        os.rename(scratch, folder)
    except OSError:
        if not _is_complete(folder):
            raise


def _index_files(folder: Path, name: str) -> tuple[Path, Path]:
    """The files of the starts and the names of a split's documents."""
    return folder / f"{name}.documents.npy", folder / f"{name}.documents.jsonl"


def _is_complete(folder: Path) -> bool:
    """Whether the manifest is there and every file that it lists has its length."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        width = np.dtype(manifest["dtype"]).itemsize
        splits = [manifest["splits"][name] for name in SPLITS]
        lengths = [(shard["file"], shard["num_tokens"] * width) for split in splits for shard in split["shards"]]
        lengths += [(part["file"], part["num_bytes"]) for split in splits for part in split["index"]]
        return all((folder / file).stat().st_size == length for file, length in lengths)
    except (OSError, ValueError, KeyError, TypeError):
        return False

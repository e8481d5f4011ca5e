"""Documents -> token shards, once: by all cores, restartable where it stopped, safe when started twice at once.

A folder in the making holds `recipe.json`, the tokenizer and `parts/` (`tfdp/parts.py`). When all parts are there they
are joined into the shards of `tfdp/shards.py`; the manifest is written last, then the parts go.
"""

import hashlib
import heapq
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tfdp import bpe
from tfdp.cleaning import Cleaner, Cleaning, fingerprint
from tfdp.corpus import Document, documents, licence_of
from tfdp.exits import ConfigError
from tfdp.files import locking, write_whole
from tfdp.overlap import Overlap
from tfdp.parts import LEFT_OUT, Encoding, Part, encode_all, stretches
from tfdp.processes import make_pool
from tfdp.shards import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    SPLITS,
    TOKENIZER_FOLDER,
    SplitWriter,
    TokenShards,
    is_complete,
    open_shards,
    read_manifest,
)
from tfdp.tokenizer import Tokenizer, make_tokenizer, open_tokenizer, save_tokenizer, size_to_train

SAMPLE_BYTES = 32 << 20  # of text, that a vocabulary is trained on
_OVERLAP_TOKENS = 16 << 20  # whose text one process looks through at a time


@dataclass(frozen=True)
class Recipe:
    """What shards are made from.

    Attributes:
      source, validation_source: as `data.source` names them; without the second, documents are held out.
      validation_fraction: of the bytes, to hold out.
      tokenizer: a name as `tfdp/tokenizer.py` lists them.
      cleaning: of each document.
      licence: of the text, if known.
      section: of the configuration that these keys come from, with its dot; to name what is wrong.
    """

    source: str
    validation_source: str | None
    validation_fraction: float
    tokenizer: str
    cleaning: Cleaning = Cleaning()
    licence: str | None = None
    section: str = ""

    def facts(self) -> dict[str, Any]:
        """What the bytes of the shards follow from, with the content of the files it names."""
        size = size_to_train(self.tokenizer)
        held_out = self.validation_fraction if self.validation_source is None else None
        return {
            "source": self.source,
            "validation_source": self.validation_source,
            "validation_fraction": held_out,
            "tokenizer": f"bpe:{size}"
            if size
            else make_tokenizer(self.tokenizer, f"{self.section}tokenizer").fingerprint,
            "cleaning": fingerprint(self.cleaning),
        }


class Watcher:
    """Is told how a preparation gets on; this one says nothing."""

    def say(self, line: str) -> None:
        """A line worth reading."""

    def part(self, part: Part) -> None:
        """A part is there."""

    def wait(self) -> None:
        """Another process prepares this folder: its end is waited for."""


def prepare(
    recipe: Recipe,
    folder: Path,
    key: str = "output",
    watcher: Watcher | None = None,
    num_processes: int = 1,
    overlap: bool = False,
    facts: dict[str, Any] | None = None,
) -> TokenShards:
    """Makes the shards of a recipe in a folder, or what is left to make of them, and opens them.

    Args:
      recipe: what to make.
      folder: where; what another process has begun there is waited for, then taken.
      key: that the folder comes from, to blame.
      watcher: is told how it gets on.
      num_processes: that encode.
      overlap: whether to measure how much of the validation text occurs in the training text.
      facts: what the folder must have been made from; None: the recipe's own, with the names of the sources.

    Raises:
      ConfigError: a mistake in the source, or a folder that holds something else or cannot be written.
    """
    watcher = watcher or Watcher()
    facts = facts or recipe.facts()

    def is_done() -> bool:
        return _is_made(folder, facts) and not (overlap and read_manifest(folder)["overlap"] is None)

    try:
        if is_done():
            watcher.say(f"{folder} is prepared already")
            return open_shards(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with locking(folder / ".lock", lambda _holder: watcher.wait()):
            if not _is_made(folder, facts):
                _make(recipe, facts, folder, watcher, num_processes)
            if not is_done():
                _measure_overlap(folder, num_processes)
    except OSError as error:
        raise ConfigError(f"{key} ({folder}) must be a folder that can be written: {error}") from None
    return open_shards(folder)


def corpus_sha256(recipe: Recipe) -> str:
    """Reads the sources and digests names and texts in order: what shards of them are found again by."""
    digest = hashlib.sha256()
    for _ in _labelled_documents(recipe, digest):
        pass
    return digest.hexdigest()


def _is_made(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether the folder holds these shards whole. Raises `ConfigError` where it holds, or was to hold, others."""
    for state, read in (("shards", _recipe_of_manifest), ("an unfinished preparation", _begun_recipe)):
        try:
            found = read(folder)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        changed = [f"{key}: {found.get(key)} -> {facts[key]}" for key in facts if found.get(key) != facts[key]]
        if changed:
            raise ConfigError(
                f"{folder} holds {state} of something else ({'; '.join(changed)}): name another folder, or remove it"
            )
    return is_complete(folder)


def _recipe_of_manifest(folder: Path) -> dict[str, Any]:
    return dict(read_manifest(folder)["recipe"])


def _begun_recipe(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "recipe.json").read_text()))


def _make(recipe: Recipe, facts: dict[str, Any], folder: Path, watcher: Watcher, num_processes: int) -> None:
    parts_folder = folder / "parts"
    (folder / MANIFEST_FILE).unlink(missing_ok=True)  # of shards that are damaged
    parts_folder.mkdir(exist_ok=True)
    write_whole(folder / "recipe.json", json.dumps(facts, indent=1))
    try:
        _make_parts_and_join(recipe, facts, folder, watcher, num_processes)
    except ConfigError:
        if not any(parts_folder.glob("*.json")):  # nothing is done yet, and what is wrong may be the recipe
            shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
            (folder / "recipe.json").unlink()
        raise
    shutil.rmtree(parts_folder)
    (folder / "recipe.json").unlink()


def _make_parts_and_join(
    recipe: Recipe, facts: dict[str, Any], folder: Path, watcher: Watcher, num_processes: int
) -> None:
    tokenizer = _tokenizer(recipe, folder, watcher)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32).newbyteorder("<").str
    digest = hashlib.sha256()
    encoding = Encoding(folder / "parts", folder / TOKENIZER_FOLDER, recipe.cleaning, dtype)
    labelled = _labelled_documents(recipe, digest)
    parts = encode_all(stretches(labelled), encoding, num_processes, watcher.part)
    index = _joined_index(parts, recipe.cleaning.duplicates)
    splits = _split_of_documents(parts, index, recipe.validation_fraction)
    manifest = {
        "version": FORMAT_VERSION,
        **{key: value for key, value in recipe.facts().items() if key != "tokenizer"},
        "licence": recipe.licence or licence_of(recipe.source),
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "corpus_sha256": digest.hexdigest(),
        "num_documents_read": len(index),
        "left_out": _count_left_out(index),
        "splits": {
            name: _join(parts, index, splits == number, SplitWriter(folder, name, dtype, tokenizer.end_of_text))
            for number, name in enumerate(SPLITS)
        },
        "overlap": None,
        "recipe": facts,
    }
    write_whole(folder / MANIFEST_FILE, json.dumps(manifest, indent=1, ensure_ascii=False))


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------


def _labelled_documents(recipe: Recipe, digest: "hashlib._Hash") -> Iterator[tuple[str, Document]]:
    """Yields (split, document) in order, the split empty where it is decided later; digests what it reads.

    A source that is one document is cut in two, unless there is a source for validation.
    """

    def read(source: str, key: str) -> Iterator[Document]:
        for document in documents(source, key):
            text = document.text.encode()
            digest.update(f"{len(document.name)} {document.name} {len(text)} ".encode())
            digest.update(text)
            yield document

    key, validation_key = f"{recipe.section}source", f"{recipe.section}validation_source"
    if recipe.validation_source is not None:
        yield from (("train", document) for document in read(recipe.source, key))
        digest.update(b"validation")
        yield from (("validation", document) for document in read(recipe.validation_source, validation_key))
        return
    held: list[Document] = []  # until it is known whether a second one has text
    with_text = 0
    for document in read(recipe.source, key):
        if with_text < 2:
            held.append(document)
            with_text += bool(document.text)
            if with_text == 2:
                yield from (("", document) for document in held)
        else:
            yield "", document
    if with_text < 2:
        digest.update(repr(recipe.validation_fraction).encode())
        for document in held:
            yield from _cut(document, recipe.validation_fraction) if document.text else [("train", document)]


def _cut(document: Document, validation_fraction: float) -> Iterator[tuple[str, Document]]:
    """Cuts a corpus that is one document, at the last line break before its validation part."""
    cut = round(len(document.text) * (1.0 - validation_fraction))
    near = cut - (len(document.text) - cut) // 2  # no line break for long: cut inside the line
    cut = document.text.rfind("\n", near, cut) + 1 or cut
    yield "train", Document(document.name, document.text[:cut])
    yield "validation", Document(document.name, document.text[cut:])


def _tokenizer(recipe: Recipe, folder: Path, watcher: Watcher) -> Tokenizer:
    """The tokenizer of the recipe, trained on the text if it says so; in the folder from now on."""
    home = folder / TOKENIZER_FOLDER
    if home.exists():
        return open_tokenizer(home)
    size = size_to_train(recipe.tokenizer)
    if size is None:
        tokenizer = make_tokenizer(recipe.tokenizer, f"{recipe.section}tokenizer")
    else:
        watcher.say(f"reading {recipe.source} to train {recipe.tokenizer}")
        sample = _sample(document for document in documents(recipe.source, f"{recipe.section}source") if document.text)
        num_bytes = sum(len(text.encode()) for text in sample)
        watcher.say(f"training {recipe.tokenizer} on {len(sample):,} documents, {num_bytes / 1e6:,.1f} MB")
        cleaner = Cleaner(recipe.cleaning)
        cleaned = (cleaner.clean(text)[0] for text in sample)
        tokenizer = bpe.train((piece for text in cleaned for piece in bpe.segments(text, 1 << 14)), size)
        if tokenizer.vocab_size < size:
            watcher.say(f"the text has pairs for {tokenizer.vocab_size:,} tokens only, not {size:,}")
    save_tokenizer(tokenizer, home)
    return tokenizer


def _sample(all_documents: Iterable[Document]) -> list[str]:
    """Texts of up to `SAMPLE_BYTES`: of all documents, those whose names hash lowest, in the order of the hashes.

    A single document that is larger gives its beginning.
    """
    chosen: list[tuple[int, str]] = []  # a heap, the highest hash first
    size = 0
    for document in all_documents:
        rank = int.from_bytes(hashlib.sha256(f"sample {document.name}".encode()).digest()[:8])
        if size >= SAMPLE_BYTES and rank > -chosen[0][0]:
            continue
        heapq.heappush(chosen, (-rank, document.text[:SAMPLE_BYTES]))
        size += len(document.text[:SAMPLE_BYTES])
        while size - len(chosen[0][1]) >= SAMPLE_BYTES:
            size -= len(heapq.heappop(chosen)[1])
    return [text for _, text in sorted(chosen, reverse=True)]


# ---------------------------------------------------------------------------------------------------
# Choosing
# ---------------------------------------------------------------------------------------------------


def _joined_index(parts: list[Part], without_duplicates: bool) -> np.ndarray:
    """The records of all documents in order; of duplicates, all but the first are marked as left out."""
    index = np.concatenate([part.index() for part in parts])
    if without_duplicates:
        counted = np.flatnonzero(index["left_out"] == 0)
        _, first = np.unique(index["text_digest"][counted], axis=0, return_index=True)
        again = np.ones(len(counted), dtype=bool)
        again[first] = False
        index["left_out"][counted[again]] = LEFT_OUT.index("duplicate")
    return index


def _split_of_documents(parts: list[Part], index: np.ndarray, fraction: float) -> np.ndarray:
    """The number of the split of each document, in `SPLITS`; -1 for one that is left out."""
    labels = np.repeat([SPLITS.index(part.split or "train") for part in parts], [part.num_documents for part in parts])
    splits = np.where(index["left_out"] == 0, labels, -1)
    if all(part.split == "" for part in parts):
        splits[_held_out(index, fraction)] = SPLITS.index("validation")
    return splits


def _held_out(index: np.ndarray, fraction: float) -> np.ndarray:
    """Documents for validation, by the hash of their names: each that still fits into the fraction of all bytes.

    So the choice depends neither on a seed nor on the order of files. At least one is taken: else the shortest.
    """
    candidates = np.flatnonzero((index["left_out"] == 0) & (index["num_bytes"] > 0))
    ranked = candidates[np.argsort(index["name_rank"][candidates], kind="stable")]
    sizes = index["num_bytes"][ranked]
    left, chosen = fraction * float(sizes.sum()), []
    for document, size in zip(ranked.tolist(), sizes.tolist(), strict=True):
        if size <= left:
            chosen.append(document)
            left -= size
    if not chosen and len(ranked):
        chosen = [int(ranked[np.argmin(sizes)])]
    return np.array(chosen, dtype=np.int64)


def _count_left_out(index: np.ndarray) -> dict[str, int]:
    counts = np.bincount(index["left_out"], minlength=len(LEFT_OUT))
    return {reason: int(count) for reason, count in zip(LEFT_OUT, counts, strict=True) if reason and count}


# ---------------------------------------------------------------------------------------------------
# Joining
# ---------------------------------------------------------------------------------------------------


def _join(parts: list[Part], index: np.ndarray, wanted: np.ndarray, writer: SplitWriter) -> dict[str, Any]:
    """Writes the wanted documents of all parts as one split; returns its part of the manifest."""
    first = 0
    for part in parts:
        of_part = slice(first, first + part.num_documents)
        first += part.num_documents
        here = wanted[of_part]
        if not here.any():
            continue
        lengths = index["num_tokens"][of_part]
        ids = np.fromfile(part.tokens_path, dtype=writer.dtype)
        names = [name for name, keep in zip(part.names(), here.tolist(), strict=True) if keep]
        writer.add(
            ids[np.repeat(here, lengths + 1)], lengths[here], names, int(index["num_bytes"][of_part][here].sum())
        )
    return writer.finish()


def _measure_overlap(folder: Path, num_processes: int) -> None:
    """Adds to the manifest how many of the distinct byte windows of validation occur in training too."""
    num_tokens = open_shards(folder).train.num_tokens
    ranges = [(begin, min(begin + _OVERLAP_TOKENS, num_tokens)) for begin in range(0, num_tokens, _OVERLAP_TOKENS)]
    if len(ranges) == 1 or num_processes == 1:
        marks = [_mark(folder, *each) for each in ranges]
    else:
        with make_pool(num_processes) as pool:
            marks = list(pool.map(_mark, [folder] * len(ranges), *zip(*ranges, strict=True)))
    result = _overlap_of(folder).result(np.logical_or.reduce(marks))
    manifest = read_manifest(folder)
    manifest["overlap"] = {**asdict(result), "fraction": round(result.fraction, 9), "told": result.describe()}
    write_whole(folder / MANIFEST_FILE, json.dumps(manifest, indent=1, ensure_ascii=False))
    _overlap_of.cache_clear()


def _mark(folder: Path, begin: int, stop: int) -> np.ndarray:
    """Which windows of the validation text occur in these tokens of the training text."""
    shards, measured = open_shards(folder), _overlap_of(folder)
    found = measured.nothing_found()
    for chunk in shards.train.byte_chunks(shards.tokenizer.token_bytes, begin, stop):
        measured.mark(found, chunk)
    return found


@lru_cache(maxsize=1)
def _overlap_of(folder: Path) -> Overlap:
    """The windows of the validation text, made once in each process."""
    shards = open_shards(folder)
    validation = shards.validation
    return Overlap(validation.byte_chunks(shards.tokenizer.token_bytes, 0, validation.num_tokens), validation.num_bytes)

"""Documents -> parts: files with the token ids of one group of documents each, encoded by all cores.

A part is written whole or not at all, and its content depends on its documents alone, so a preparation that was killed
continues with the parts that it has. For part N its folder holds

    N.tokens    ids, flat: document, end-of-text, document, end-of-text, ...
    N.index     a record for each document: `INDEX`, as an .npy file
    N.json      names of the documents, digest of their text, lengths and sha256 of the other two files; written last
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from tfdp.data import examples
from tfdp.data.cleaning import Cleaner, Cleaning
from tfdp.data.corpus import Document
from tfdp.data.tokenizers.tokenizer import Tokenizer, markup_ids, open_tokenizer
from tfdp.system.exits import ConfigError
from tfdp.system.files import replacing
from tfdp.system.processes import make_pool
from tfdp.system.sealed import read_sealed, write_sealed
from tfdp.tasks.flags import UNSCORED

PARTS_FOLDER = "parts"
GROUP_BYTES = 16 << 20  # of text, in one part; a longer document has a part of its own
INDEX = np.dtype(
    [
        ("num_tokens", "<i8"),  # without the end of text
        ("num_bytes", "<i8"),  # of cleaned text, as UTF-8
        ("name_rank", "<u8"),  # from the hash of the name: the order in which documents are held out
        ("text_digest", "<u8", (2,)),  # of the cleaned text: equal for duplicates
        ("left_out", "u1"),  # index into LEFT_OUT
    ]
)
LEFT_OUT = ("", "too short", "too long", "duplicate")


@dataclass(frozen=True)
class DocumentGroup:
    """Consecutive documents that are encoded together.

    Attributes:
      number: of the part that they become.
      split: that they belong to; empty where that is decided later.
      names: of the documents.
      texts: UTF-8, one after the other.
      sizes: bytes of each.
    """

    number: int
    split: str
    names: list[str]
    texts: bytes
    sizes: list[int]

    def digest(self) -> str:
        """The digest of all that the part is made from."""
        told = json.dumps([self.split, self.names, self.sizes]).encode()
        return hashlib.sha256(told + hashlib.sha256(self.texts).digest()).hexdigest()


@dataclass(frozen=True)
class Part:
    """A written part."""

    folder: Path
    number: int
    split: str
    digest: str
    num_documents: int
    num_bytes: int  # of the documents as they were read

    @property
    def tokens_path(self) -> Path:
        return self.folder / f"{self.number:07d}.tokens"

    @property
    def index_path(self) -> Path:
        return self.folder / f"{self.number:07d}.index"

    @property
    def facts_path(self) -> Path:
        return self.folder / f"{self.number:07d}.json"

    def index(self) -> np.ndarray:
        """A record of `INDEX` for each document."""
        with self.index_path.open("rb") as file:
            return np.load(file)

    def names(self) -> list[str]:
        return read_sealed(self.facts_path)["names"]

    def files(self) -> list[list[int | str]]:
        """Length and sha256 of the files of the tokens and the index, as they are."""
        found: list[list[int | str]] = []
        for path in (self.tokens_path, self.index_path):
            with path.open("rb") as file:
                found.append([path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()])
        return found


@dataclass(frozen=True)
class Encoding:
    """How documents become ids.

    Attributes:
      folder: of the parts.
      tokenizer_folder: as `tokenizer.save_tokenizer` wrote it.
      cleaning: applied before.
      dtype: of the ids.
      has_marks: whether they are examples, whose ids carry what is learned.
    """

    folder: Path
    tokenizer_folder: Path
    cleaning: Cleaning
    dtype: str
    has_marks: bool = False


def groups(documents: Iterable[tuple[str, Document]]) -> Iterator[DocumentGroup]:
    """Groups (split, document) pairs, in their order, by split and up to about `GROUP_BYTES`."""
    number, current, size = 0, "", 0
    names: list[str] = []
    texts: list[bytes] = []
    for split, document in documents:
        text = document.text.encode()
        if names and (split != current or size + len(text) > GROUP_BYTES):
            yield DocumentGroup(number, current, names, b"".join(texts), list(map(len, texts)))
            number, names, texts, size = number + 1, [], [], 0
        current = split
        names.append(document.name)
        texts.append(text)
        size += len(text)
    if names:
        yield DocumentGroup(number, current, names, b"".join(texts), list(map(len, texts)))


def encode_all(
    all_groups: Iterable[DocumentGroup], encoding: Encoding, num_processes: int, on_part: Callable[[Part], None]
) -> list[Part]:
    """Encodes the groups that have no part yet; returns all parts in order.

    Args:
      all_groups: in order.
      encoding: how.
      num_processes: to encode with; the first group of all is encoded here, so a small corpus starts none.
      on_part: called for each part as it is done.

    Raises:
      ConfigError: a part is there and its documents have changed, or a process was killed.
    """
    parts: list[Part] = []
    waiting: set[Future[Part]] = set()

    def take(done: Iterable[Future[Part]]) -> None:
        for future in done:
            parts.append(future.result())
            on_part(parts[-1])

    with contextlib.ExitStack() as stack:
        pool: ProcessPoolExecutor | None = None
        try:
            for group in all_groups:
                part = find_part(encoding.folder, group)
                if part is None and group.number > 0 and num_processes > 1:
                    pool = pool or stack.enter_context(make_pool(num_processes))
                    waiting.add(pool.submit(encode, group, encoding))
                else:
                    parts.append(part or encode(group, encoding))
                    on_part(parts[-1])
                while len(waiting) > num_processes:  # one more than can run, so that no process waits for the reader
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    take(done)
            take(wait(waiting).done)
        except BrokenProcessPool:
            raise ConfigError(
                "an encoding process was killed (out of memory?): run the same command again, it continues from here"
            ) from None
        finally:
            for future in waiting:
                future.cancel()
    return sorted(parts, key=lambda part: part.number)


def find_part(folder: Path, group: DocumentGroup) -> Part | None:
    """The part of a group, if it is there as it was written; `ConfigError` if it was made from other documents."""
    part = Part(folder, group.number, group.split, group.digest(), len(group.names), len(group.texts))
    try:
        facts = read_sealed(part.facts_path)
        if facts.get("files") != part.files():
            return None
    except (OSError, ValueError):
        return None
    if facts["digest"] != part.digest:
        raise ConfigError(
            f"the source has changed since {folder.parent} was begun (near {group.names[0]}): remove that, "
            f"and prepare it again"
        )
    return part


def encode(group: DocumentGroup, encoding: Encoding) -> Part:
    """Cleans and encodes a group, and writes its part."""
    tokenizer, cleaner = _tools(encoding.tokenizer_folder, encoding.cleaning)
    part = Part(encoding.folder, group.number, group.split, group.digest(), len(group.names), len(group.texts))
    index = np.zeros(len(group.names), INDEX)
    end = np.array([tokenizer.end_of_text], encoding.dtype)
    pieces: list[np.ndarray] = []
    start = 0
    for entry, name, size in zip(index, group.names, group.sizes, strict=True):
        text = group.texts[start : start + size]
        start += size
        ids = _encode_document(entry, text, name, tokenizer, cleaner, encoding.has_marks)
        pieces += [ids.astype(encoding.dtype), end]
    _write(part, np.concatenate(pieces), index, group.names)
    return part


def example_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a document with marks; those that are only seen carry `UNSCORED`.

    Each part is encoded by itself, as a prompt is when a model is asked: no token reaches across a mark.
    """
    parts = [(markup_ids(tokenizer, part).astype(np.uint32), learned) for part, learned in examples.split(text)]
    return np.concatenate([ids if learned else ids | UNSCORED for ids, learned in parts])


def _encode_document(
    entry: np.void,
    data: bytes,
    name: str,
    tokenizer: Tokenizer,
    cleaner: Cleaner,
    has_marks: bool,
) -> np.ndarray:
    """Fills in the record of a document and returns its ids; none if it is omitted."""
    entry["name_rank"] = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    read = data.decode()
    text, reason = cleaner.clean(read)
    if reason is not None:
        entry["left_out"] = LEFT_OUT.index(reason)
        return np.zeros(0, np.uint8)
    cleaned = data if text is read else text.encode()
    entry["num_bytes"] = len(examples.unmarked(text).encode()) if has_marks else len(cleaned)
    entry["text_digest"] = np.frombuffer(hashlib.sha256(cleaned).digest()[:16], "<u8")
    ids = example_ids(tokenizer, text) if has_marks else tokenizer.encode(text)
    entry["num_tokens"] = len(ids)
    return ids


def _write(part: Part, tokens: np.ndarray, index: np.ndarray, names: list[str]) -> None:
    with replacing(part.tokens_path) as scratch:
        tokens.tofile(scratch)
    with replacing(part.index_path) as scratch, scratch.open("wb") as file:
        np.save(file, index)
    write_sealed(part.facts_path, {"digest": part.digest, "files": part.files(), "names": names}, indent=None)


@lru_cache(maxsize=1)
def _tools(tokenizer_folder: Path, cleaning: Cleaning) -> tuple[Tokenizer, Cleaner]:
    """The tokenizer and the cleaner, made once in each process."""
    return open_tokenizer(tokenizer_folder), Cleaner(cleaning)

"""The input of a preparation: the documents of a recipe in order, and a check that there is text in them."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfdp.data import joining
from tfdp.data.cleaning import Cleaning, fingerprint
from tfdp.data.corpus import Document, condition_of, documents, num_records
from tfdp.data.examples import ExampleKeys, Form
from tfdp.data.manifest import SPLITS
from tfdp.data.tokenizers.tokenizer import make_tokenizer, size_to_train
from tfdp.system.exits import ConfigError

SAMPLE_BYTES = 32 << 20  # of text, that a vocabulary is trained on


@dataclass(frozen=True)
class Recipe:
    """What shards are made from.

    Attributes:
      source, validation_source: as `data.source` names them; without the second, documents are held out.
      validation_fraction: of the bytes, to hold out.
      tokenizer: a name as `tfdp/data/tokenizers/tokenizer.py` lists them.
      cleaning: of each document.
      licence: of the text, if known.
      section: of the configuration that these keys come from, with its dot; to name what is wrong.
      form: that makes examples of records; None: documents are plain text.
      example_keys: that the form was made of, for the manifest.
    """

    source: str
    validation_source: str | None
    validation_fraction: float
    tokenizer: str
    cleaning: Cleaning = Cleaning()
    licence: str | None = None
    section: str = ""
    form: Form | None = None
    example_keys: ExampleKeys | None = None

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
            **({} if self.form is None else {"examples": self.form.fingerprint}),
        }


class NoText(ConfigError):
    """A source of which no text is left."""


def corpus_sha256(recipe: Recipe) -> str:
    """Reads the sources and digests names and texts in order: what shards of them are found again by."""
    digest = hashlib.sha256()
    for _ in labelled_documents(recipe, digest):
        pass
    return digest.hexdigest()


def labelled_documents(recipe: Recipe, digest: "hashlib._Hash") -> Iterator[tuple[str, Document]]:
    """Yields (split, document) in order, the split empty where it is decided later; digests what it reads.

    A source that is one document is cut in two, unless there is a source for validation, or it is an example.
    """

    def read(source: str, key: str) -> Iterator[Document]:
        for document in documents(source, key, recipe.form):
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
            is_cut = document.text and recipe.form is None
            yield from _cut(document, recipe.validation_fraction) if is_cut else [("train", document)]


def _cut(document: Document, validation_fraction: float) -> Iterator[tuple[str, Document]]:
    """Cuts a corpus that is one document, at the last line break before its validation part."""
    cut = round(len(document.text) * (1.0 - validation_fraction))
    near = cut - (len(document.text) - cut) // 2  # no line break for long: cut inside the line
    cut = document.text.rfind("\n", near, cut) + 1 or cut
    yield "train", Document(document.name, document.text[:cut])
    yield "validation", Document(document.name, document.text[cut:])


def sample(all_documents: Iterable[Document]) -> list[str]:
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


def require_text(recipe: Recipe, index: np.ndarray, labels: np.ndarray) -> None:
    """Raises `NoText` for a source of which no text is left, saying what was found."""
    sources = [("source", recipe.source, labels >= 0)]
    if recipe.validation_source is not None:
        sources = [
            ("source", recipe.source, labels == 0),
            ("validation_source", recipe.validation_source, labels == 1),
        ]
    for name, source, of_source in sources:
        found = index[of_source]
        if not np.any(found["num_bytes"][found["left_out"] == 0]):
            key = f"{recipe.section}{name}"
            raise NoText(f"{key} ({source}) must not be empty: {_what_was_found(source, key, found)}")


def require_both(recipe: Recipe, index: np.ndarray, choice: joining.Choice) -> None:
    """Raises `NoText` for a text so short that one split gets none of it."""
    sizes = [choice.num_bytes(index, number) for number in range(len(SPLITS))]
    if not all(sizes):
        raise NoText(
            f"{recipe.section}source ({recipe.source}) must hold text for both splits, and all of its {sum(sizes):,} "
            f"bytes are for {SPLITS[int(sizes[0] == 0)]}: name more text, or a validation_source"
        )


def _what_was_found(source: str, key: str, index: np.ndarray) -> str:
    """Why a source gives no text, and what to do."""
    if not len(index):
        if (condition := condition_of(source, key)) and (count := num_records(source, key)):
            return f"{count:,} records read, none with {'='.join(condition)}: check the key and its value"
        return "it holds no documents: name another source"
    left_out = joining.count_left_out(index)
    num_empty = len(index) - sum(left_out.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in {**left_out, "empty": num_empty}.items() if count)
    if left_out:
        return f"cleaning skipped all {len(index):,} documents ({reasons}): loosen cleaning, or name another source"
    return f"none of its {len(index):,} documents holds text: name another source"

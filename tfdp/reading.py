"""What shards are made from: the documents of a recipe in their order."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tfdp.cleaning import Cleaning, fingerprint
from tfdp.corpus import Document, documents
from tfdp.tokenizer import make_tokenizer, size_to_train

SAMPLE_BYTES = 32 << 20  # of text, that a vocabulary is trained on


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


def corpus_sha256(recipe: Recipe) -> str:
    """Reads the sources and digests names and texts in order: what shards of them are found again by."""
    digest = hashlib.sha256()
    for _ in labelled_documents(recipe, digest):
        pass
    return digest.hexdigest()


def labelled_documents(recipe: Recipe, digest: "hashlib._Hash") -> Iterator[tuple[str, Document]]:
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

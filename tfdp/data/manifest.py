"""The manifest of a folder of token shards: what the shards were made from, the counts, and the sha256 of every file.

The manifest carries its own sha256 too. One of version 4 has neither that nor the digests of the index files; it is
still read (`tfdp/data/shards.py` checks what it can), and `tfdp.prepare` replaces it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfdp.data.examples import ExampleKeys
from tfdp.system.sealed import read_sealed, write_sealed

FORMAT_VERSION, OLDEST_READ = 5, 4
EXAMPLES_VERSION = 6  # shards of examples, whose ids carry flags (tfdp/tasks/flags.py)
EXAMPLE_KEYS = "example_keys"  # of the manifest: how records became examples, which earlier ones do not say
SPLITS = ("train", "validation")
MANIFEST_FILE, TOKENIZER_FOLDER = "manifest.json", "tokenizer"
DTYPES = ("<u2", "<u4")


@dataclass(frozen=True)
class ListedFile:
    """A file as a manifest lists it.

    Attributes:
      name: its path below the folder.
      num_bytes: its length.
      sha256: of its content; None where a manifest of version 4 does not say.
      dtype: of its token ids; None where it holds none.
      has_flags: whether they carry flags.
    """

    name: str
    num_bytes: int
    sha256: str | None
    dtype: str | None = None
    has_flags: bool = False


@dataclass(frozen=True)
class SplitFacts:
    """What a manifest says of a split."""

    num_tokens: int
    num_bytes: int  # of text
    num_documents: int
    shards: Sequence[ListedFile]
    index: Sequence[ListedFile]


@dataclass(frozen=True)
class Manifest:
    """What reading a folder of shards needs of its manifest."""

    version: int
    dtype: str
    tokenizer: str  # its fingerprint
    corpus_sha256: str
    splits: dict[str, SplitFacts]
    tokenizer_files: Sequence[ListedFile]
    example_keys: ExampleKeys | None = None  # None: its documents are plain text, or it does not say

    @property
    def has_flags(self) -> bool:
        """Whether the shards are those of examples."""
        return self.version == EXAMPLES_VERSION

    @property
    def files(self) -> list[ListedFile]:
        """Token ids and index files of both splits."""
        return [file for split in self.splits.values() for file in (*split.shards, *split.index)]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises `OSError` where there is none, `ValueError` where it is damaged, foreign or of an unknown version."""
        content = read_manifest(folder)
        try:
            if not OLDEST_READ <= content["version"] <= EXAMPLES_VERSION or content["dtype"] not in DTYPES:
                raise ValueError(f"version {content['version']!r} with ids of {content['dtype']!r} is unknown")
            return cls(
                content["version"],
                content["dtype"],
                content["tokenizer"],
                content["corpus_sha256"],
                {name: _split_facts(content, name) for name in SPLITS},
                [_listed(entry) for entry in content.get("tokenizer_files", [])],
                ExampleKeys(**content[EXAMPLE_KEYS]) if EXAMPLE_KEYS in content else None,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a key is missing or wrong ({type(error).__name__}: {error})") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """All that a manifest says. Raises `OSError`, or `ValueError` where it is damaged."""
    path = folder / MANIFEST_FILE
    content = read_sealed(path, needs_seal=False)
    # A flipped bit makes 4 of the version 5; it does not take the digest away too.
    return content if content.get("version") == OLDEST_READ else read_sealed(path)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    write_sealed(folder / MANIFEST_FILE, content)


def list_files(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Entries of a manifest for files that were just written."""
    entries = []
    for name in names:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries.append({"file": name, "num_bytes": (folder / name).stat().st_size, "sha256": digest})
    return entries


def _split_facts(content: dict[str, Any], name: str) -> SplitFacts:
    entry, dtype, has_flags = content["splits"][name], content["dtype"], content["version"] == EXAMPLES_VERSION
    width = np.dtype(dtype).itemsize
    shards = [
        ListedFile(each["file"], each["num_tokens"] * width, each["sha256"], dtype, has_flags)
        for each in entry["shards"]
    ]
    index = [_listed(each) for each in entry["index"]]
    if sum(each["num_tokens"] for each in entry["shards"]) != entry["num_tokens"]:
        raise ValueError("the tokens of its shards do not add up")
    return SplitFacts(entry["num_tokens"], entry["num_bytes"], entry["num_documents"], shards, index)


def _listed(entry: dict[str, Any]) -> ListedFile:
    return ListedFile(entry["file"], entry["num_bytes"], entry.get("sha256"))

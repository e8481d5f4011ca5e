"""Writes the shards and the index files of a split (`tfdp/data/shards.py` has their form)."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfdp.data.manifest import list_files
from tfdp.data.shards import index_files

TOKENS_PER_SHARD = 1 << 28


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
        _, names_path = index_files(folder, name)
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
        starts_path, names_path = index_files(self._folder, self._name)
        np.save(starts_path, np.concatenate([*self._starts, np.zeros(0, np.int64)]))
        return {
            "num_tokens": self._num_tokens,
            "num_bytes": self._num_bytes,
            "num_documents": self._num_documents,
            "shards": self._shards,
            "index": list_files(self._folder, [starts_path.name, names_path.name]),
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

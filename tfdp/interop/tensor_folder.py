"""Tensors by name in a folder of safetensors: `model.safetensors`, or several files and `model.safetensors.index.json`.

Read by memory map, tensor by tensor; nothing else of a file comes into memory. Pickles (`.bin`, `.pt`) are refused: to
read one is to run what it says.
"""

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfdp.data import strict_json
from tfdp.system.exits import ConfigError
from tfdp.system.messages import shown

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class TensorFolder:
    """The tensors of a folder.

    Args:
      folder: with the files.
      where: what to blame: the configuration key and the folder, as "model.init_from (FOLDER)".
      file: the one with the tensors, unless an index names several.

    Raises:
      ConfigError: there is no such file, or one is damaged, is no safetensors, or lacks a tensor of the index.
    """

    def __init__(self, folder: Path, where: str, file: str = WEIGHTS_FILE) -> None:
        self._tensors: dict[str, tuple[np.ndarray, str]] = {}  # as stored, and the type of its numbers
        self._maps: list[mmap.mmap] = []
        for path, wanted in _files(folder, where, file).items():
            data, found = _mapped(path, f"{where}: {path.name}")
            self._maps.append(data)
            missing = [name for name in wanted if name not in found]
            if missing:
                raise ConfigError(f"{where}: {path.name} must hold {missing[0]}, as {INDEX_FILE} says")
            self._tensors |= {name: found[name] for name in wanted or found}

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][0].shape

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32; a view of the file where it is float32 there.

        What was read before leaves the memory of this process, and comes back only if it is used again.
        """
        for data in self._maps:
            data.madvise(mmap.MADV_DONTNEED)
        stored, kind = self._tensors[name]
        if kind == "BF16":  # the upper half of a float32
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32, copy=False)


def metadata_of(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says besides its tensors; {} for a file that is none."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return {}


def _files(folder: Path, where: str, file: str) -> dict[Path, list[str]]:
    """The files, and the tensors to take from each; none named: all."""
    if file == WEIGHTS_FILE and (folder / INDEX_FILE).is_file():
        try:
            index: Any = strict_json.parse((folder / INDEX_FILE).read_bytes())
            names = index["weight_map"]
            files: dict[Path, list[str]] = {}
            for name, part in names.items():
                if Path(part).name != part:
                    raise ValueError(f"{part!r} is not a file of this folder")
                files.setdefault(folder / part, []).append(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{where}: {INDEX_FILE} must map tensors to files (weight_map): {reason}") from None
        return files
    if not (folder / file).exists():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        pickle = f", but has {pickles[0]}, a pickle, and to read one is to run what it says" if pickles else ""
        fix = "; save it again with save_pretrained(safe_serialization=True)" if pickles else ""
        wanted = f"{file} or {INDEX_FILE}" if file == WEIGHTS_FILE else file
        raise ConfigError(f"{where} must hold {wanted}{pickle}{fix}")
    return {folder / file: []}


def _mapped(path: Path, where: str) -> tuple[mmap.mmap, dict[str, tuple[np.ndarray, str]]]:
    """The memory map of a file that is whole; and of each tensor, by name, an array over it and its type."""
    import safetensors

    try:
        with safetensors.safe_open(
            path, framework="np"
        ) as checked:  # the header, and that the file is as long as it says
            del checked
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{where} must be a whole safetensors file: {reason}") from None
    found: dict[str, tuple[np.ndarray, str]] = {}
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if kind not in _DTYPES:
            raise ConfigError(
                f"{where} must hold numbers in {', '.join(_DTYPES)}, but {shown(name)} is in {shown(kind)}"
            )
        dtype = np.dtype(_DTYPES[kind])
        flat = np.frombuffer(data, dtype, (end - begin) // dtype.itemsize, 8 + length + begin)
        found[name] = (flat.reshape(shape), kind)
    return data, found


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file that others may read as they may any new file; its library would keep it private."""
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})  # transformers asks for the format
    path.chmod(mode)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], dtype: str, most_bytes: int) -> None:
    """Writes tensors in order, in as many files as it takes to have at most `most_bytes` in one.

    Args:
      folder: an empty one.
      tensors: float32, by name; each is taken only when its turn has come.
      dtype: float32, float16 or bfloat16, as which they are written.
      most_bytes: of a file, unless one tensor has more.
    """
    import ml_dtypes  # NumPy has no bfloat16 of its own

    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    files: list[list[str]] = []
    share: dict[str, np.ndarray] = {}  # of the file that comes next
    total, size = 0, 0

    def close() -> None:
        path = folder / f".{len(files)}.safetensors"
        save_tensors(share, path)
        files.append(list(share))
        share.clear()

    for name, tensor in tensors:
        converted = np.ascontiguousarray(tensor, kind)
        if share and size + converted.nbytes > most_bytes:
            close()
            size = 0
        share[name] = converted
        size, total = size + converted.nbytes, total + converted.nbytes
    close()
    if len(files) == 1:
        os.rename(folder / ".0.safetensors", folder / WEIGHTS_FILE)
        return
    names: dict[str, str] = {}
    for index, held in enumerate(files):
        file = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        os.rename(folder / f".{index}.safetensors", folder / file)
        names |= dict.fromkeys(held, file)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2)
    (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")

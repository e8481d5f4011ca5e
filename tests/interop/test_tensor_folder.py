"""Tensors in files of safetensors: several files and an index, narrow numbers, and what is damaged."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tfdp.interop.tensor_folder import TensorFolder, write_tensors
from tfdp.system.exits import ConfigError


def tensors(count: int = 5) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {f"t{index}": generator.normal(size=(index + 1, 3)).astype(np.float32) for index in range(count)}


@pytest.mark.parametrize(("most_bytes", "num_files"), [(10**9, 1), (60, 4), (1, 5)])
def test_what_is_written_is_read_whatever_the_number_of_files(tmp_path: Path, most_bytes: int, num_files: int) -> None:
    write_tensors(tmp_path, tensors().items(), "float32", most_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == num_files
    assert (tmp_path / "model.safetensors.index.json").exists() == (num_files > 1)
    folder = TensorFolder(tmp_path, "here")
    assert sorted(folder.names) == sorted(tensors())
    for name, tensor in tensors().items():
        assert folder.shape(name) == tensor.shape
        assert folder.read(name).tobytes() == tensor.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_numbers_are_widened_exactly(tmp_path: Path, dtype: str) -> None:
    write_tensors(tmp_path, tensors().items(), dtype, 10**9)
    folder = TensorFolder(tmp_path, "here")
    for name, tensor in tensors().items():
        kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
        np.testing.assert_array_equal(folder.read(name), tensor.astype(kind).astype(np.float32))


def test_what_is_damaged_or_elsewhere_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"here must hold model\.safetensors or model\.safetensors\.index\.json$"):
        TensorFolder(tmp_path, "here")
    save_file(tensors(), tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    for cut in (0, 4, 100, len(data) - 1):
        (tmp_path / "model.safetensors").write_bytes(data[:cut])
        with pytest.raises(ConfigError, match=r"here: model\.safetensors must be a whole safetensors file: "):
            TensorFolder(tmp_path, "here")
    save_file({"n": np.zeros(3, np.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"must hold numbers in F64, F32, F16, BF16, but n is in I64"):
        TensorFolder(tmp_path, "here")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[", r"index\.json must map tensors to files"),
        ({}, r"index\.json must map tensors to files"),
        ({"weight_map": {"t0": "../other.safetensors"}}, r"'\.\./other\.safetensors' is not a file of this folder"),
        (
            {"weight_map": {"t0": "gone.safetensors"}},
            r"gone\.safetensors must be a whole safetensors file: No such file",
        ),
        ({"weight_map": {"t9": "model.safetensors"}}, r"model\.safetensors must hold t9, as model\.safetensors\.index"),
    ],
)
def test_a_wrong_index_is_one_line(tmp_path: Path, index: object, message: str) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    text = index if isinstance(index, str) else json.dumps(index)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        TensorFolder(tmp_path, "here")

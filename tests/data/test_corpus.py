"""Where text comes from: documents in a fixed order, and what is no text."""

import os
import re
import sysconfig
from pathlib import Path

import pytest

from tfdp.data.corpus import Document, documents
from tfdp.system.exits import ConfigError


@pytest.fixture(scope="module")
def stdlib() -> list[Document]:
    return list(documents("python-stdlib"))


def test_the_standard_library_is_large_and_in_a_fixed_order(stdlib: list[Document]) -> None:
    names = [document.name for document in stdlib]
    modules = [name.partition("/")[0].removesuffix(".py") for name in names]
    assert 500 < len(names) < 1000
    assert 9e6 < sum(len(document.text.encode()) for document in stdlib) < 14e6
    assert len(set(names)) == len(names)
    assert modules == sorted(modules)
    assert names == [document.name for document in documents("python-stdlib")]
    assert {"argparse.py", "json/__init__.py", "json/decoder.py"} <= set(names)


def test_the_standard_library_comes_without_its_tests_and_without_packages(stdlib: list[Document]) -> None:
    folders = {folder for document in stdlib for folder in document.name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "__pycache__", "site-packages"}
    assert all(document.name.endswith(".py") for document in stdlib)


def test_the_standard_library_is_read_as_it_is(stdlib: list[Document]) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    for document in stdlib[::50]:
        assert document.text.encode() == (root / document.name).read_bytes()


def test_text_files_come_sorted_by_path(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "B.txt", "c.md", "10.txt", "9.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    found = list(documents(f"text:{tmp_path}/*.txt"))
    names = ["10.txt", "9.txt", "B.txt", "a.txt", "b.txt"]
    assert found == [Document(name, f"text of {name}") for name in names]


def test_two_stars_cross_folders_and_folders_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "sub" / "folder.txt").mkdir(parents=True)
    (tmp_path / "sub" / "folder.txt" / "deep.txt").write_text("deep")
    (tmp_path / "top.txt").write_text("top")
    assert [document.text for document in documents(f"text:{tmp_path}/*.txt")] == ["top"]
    assert [document.text for document in documents(f"text:{tmp_path}/**/*.txt")] == ["deep", "top"]
    assert [document.text for document in documents(f"text:{tmp_path}/**")] == ["deep", "top"]


def test_text_is_kept_byte_for_byte(tmp_path: Path) -> None:
    content = "\ufeffa\r\nb\rc\0 é 👩‍👧\n\n".encode()
    (tmp_path / "a.txt").write_bytes(content)
    (document,) = documents(f"text:{tmp_path}/a.txt")
    assert document.text.encode() == content


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none-*.txt", ": check the path, and quote the pattern"),
        ("", ": check the path, and quote the pattern"),
        ("folder", ", and is a folder: name those in it, such as folder/**/*"),
        ("folder/**/*", ": check the path, and quote the pattern"),
    ],
)
def test_a_pattern_without_files_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    message = f"data.source (text:{pattern}) must match at least one file{message}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        list(documents(f"text:{pattern}"))


def test_a_link_to_nowhere_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match=rf"^data.source: {tmp_path}/a.txt must be readable: No such file"):
        list(documents(f"text:{tmp_path}/*.txt"))


@pytest.mark.parametrize(
    ("content", "offset", "byte"),
    [
        (b"\xff\xfea\0", 0, "0xff"),  # UTF-16
        (b"caf\xe9 au lait", 3, "0xe9"),  # Latin-1
        ("é".encode() * 5 + b"\xed\xa0\x80", 10, "0xed"),  # a surrogate
        (b"abc\xf0\x9f\x98", 3, "0xf0"),  # cut off in the middle of a character
    ],
)
def test_what_is_not_utf8_names_the_file_and_the_byte(tmp_path: Path, content: bytes, offset: int, byte: str) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        list(documents(f"text:{tmp_path}/*.txt", "data.validation_source"))
    message = str(caught.value)
    assert message.startswith(f"data.validation_source: {tmp_path}/b.txt must be UTF-8: byte {offset} is {byte} (")
    assert message.endswith("convert the file with `iconv -t UTF-8`")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("txt:a", "did you mean text?"),
        ("python-stdlb", "did you mean python-stdlib?"),
        ("/data/*.txt", "try text:PATH/*.txt"),
        ("", "try text:PATH/*.txt"),
    ],
)
def test_an_unknown_kind_suggests_the_nearest(source: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        documents(source)
    assert (
        str(caught.value)
        == f"data.source ({source}) must begin with one of python-stdlib, text, jsonl, parquet, csv, tfds: {hint}"
    )


def test_the_standard_library_takes_no_address() -> None:
    with pytest.raises(ConfigError, match=r"^data.source \(python-stdlib:x\) must have nothing after python-stdlib$"):
        list(documents("python-stdlib:x"))


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX systems only")
def test_a_file_name_that_is_not_utf8_does_not_matter(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.txt")).write_text("text")
    (document,) = documents(f"text:{tmp_path}/*.txt")
    assert document.text == "text"
    assert document.name.encode(), "the name is hashed to choose its split"

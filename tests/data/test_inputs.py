"""Which files a pattern means, each once, and what is no file to read."""

import glob
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tfdp.data import inputs
from tfdp.data.cleaning import Cleaner, Cleaning
from tfdp.data.corpus import documents
from tfdp.data.tokenizers.tokenizer import make_tokenizer
from tfdp.system.exits import ConfigError


def names(source: str) -> list[str]:
    return [document.name for document in documents(source)]


def write(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"text of {path}")


def test_without_links_the_files_are_those_of_glob_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    parts = ["a", "b", "a-b", "ab", ".hid", "x.txt", "y.txt", ".z.txt", "data"]
    patterns = ["**", "**/*", "**/*.txt", "*/**/*.txt", "a/**", "**/a/**/*.txt", "**/a*/*", "*", "*/*", "**/.hid/**/*"]
    patterns += ["[ab]/*", "**/[!a]*", "a/**/", "**/", "./**/*.txt", "a//**//*.txt", "**/**/*.txt", "none/**/*"]
    patterns += ["a**b/*", "**/data/*", "a/b/**", "a/../**/*", "**/a/../*", "?/**", "x.txt/**", "x.txt", "a/", "**.txt"]
    num_found = 0
    for trial in range(15):
        root = tmp_path / str(trial)
        root.mkdir()
        for _ in range(30):
            path = root.joinpath(*(rng.choice(parts) for _ in range(rng.randint(1, 4))))
            if not any(above.is_file() for above in path.parents) and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("")
        monkeypatch.chdir(root)
        for pattern in [*patterns, f"{root}/**/*.txt"]:
            matches = set(glob.glob(pattern, recursive=True))
            expected = sorted(path for path in matches if not Path(path).is_dir() and not path.endswith("/"))
            same = {os.path.realpath(path): path for path in reversed(expected)}  # a/../x is ./x
            try:
                found = inputs.find(pattern, "key", pattern)
            except ConfigError:
                found = []
            assert found == sorted(same.values())
            num_found += len(found)
    assert num_found > 1000


def test_a_loop_of_links_is_walked_once(tmp_path: Path) -> None:
    write(tmp_path, "docs/a.txt", "docs/sub/b.txt")
    (tmp_path / "docs" / "sub" / "loop").symlink_to(tmp_path / "docs")
    (tmp_path / "docs" / "self").symlink_to(".")
    (tmp_path / "docs" / "again").symlink_to(".")  # two of them lead to 2^40 paths
    start = time.monotonic()
    assert names(f"text:{tmp_path}/docs/**/*.txt") == ["a.txt", "sub/b.txt"]
    assert names(f"text:{tmp_path}/**/*.txt") == ["a.txt", "sub/b.txt"]
    assert names(f"text:{tmp_path}/**/sub/**/*.txt") == ["b.txt", "loop/a.txt"]
    assert time.monotonic() - start < 20


def test_a_file_with_several_names_is_one_document(tmp_path: Path) -> None:
    write(tmp_path, "real/a.txt", "real/b.txt", "elsewhere/c.txt")
    (tmp_path / "real" / "0-link.txt").symlink_to("a.txt")
    os.link(tmp_path / "real" / "b.txt", tmp_path / "real" / "c-hard.txt")
    (tmp_path / "0-link").symlink_to("real")
    assert names(f"text:{tmp_path}/real/*.txt") == ["a.txt", "b.txt"]
    assert names(f"text:{tmp_path}/*/*.txt") == ["elsewhere/c.txt", "real/a.txt", "real/b.txt"]
    assert names(f"text:{tmp_path}/**/*.txt") == ["elsewhere/c.txt", "real/a.txt", "real/b.txt"]
    assert names(f"text:{tmp_path}/0-link/*.txt") == ["a.txt", "b.txt"]


def test_a_linked_folder_outside_is_followed(tmp_path: Path) -> None:
    write(tmp_path, "outside/sub/a.txt", "inside/b.txt")
    (tmp_path / "inside" / "linked").symlink_to(tmp_path / "outside")
    assert names(f"text:{tmp_path}/inside/**/*.txt") == ["b.txt", "linked/sub/a.txt"]
    (tmp_path / "inside" / "a-second").symlink_to(tmp_path / "outside" / "sub")
    assert names(f"text:{tmp_path}/inside/**/*.txt") == ["a-second/a.txt", "b.txt"]


@pytest.mark.parametrize(
    "name", ["a[1].txt", "[b].txt", "a b.txt", "label=good.txt", "a:b.txt", "a:text", "a:k=v", "a+b.txt", "~"]
)
def test_a_name_that_exists_is_itself(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, name, "a1.txt", "b.txt", "folder[1]/sub/a1.txt", "folder1/c.txt")
    (tmp_path / name).write_text('{"text": "found"}')
    monkeypatch.chdir(tmp_path)
    assert [document.text for document in documents(f"text:{name}")] == ['{"text": "found"}']
    assert [document.text for document in documents(f"jsonl:{name}")] == ["found"]
    assert [document.text for document in documents(f"jsonl:{name}:text:text=found")] == ["found"]
    assert names("text:folder[1]/**/*.txt") == names("text:folder[1]/sub/*.txt") == ["a1.txt"]
    assert names(f"text:{tmp_path}/folder[1]/sub/a[1].txt") == ["a1.txt"]


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "books/a.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("text:~/books/*.txt") == names("text:~/**/*.txt") == ["a.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "closed/b.txt")
    (tmp_path / "closed").chmod(0)
    with pytest.raises(ConfigError, match=rf"^data.source: {tmp_path}/closed must be a folder that can be read"):
        names(f"text:{tmp_path}/**/*.txt")
    (tmp_path / "closed").chmod(0o700)


@pytest.fixture(params=["a pipe", "a socket", "a device", "a folder"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A kind of file that cannot be read twice, and one of that kind; nobody writes to the pipe."""
    path = tmp_path / "special.jsonl"
    if request.param == "a pipe":
        os.mkfifo(path)
    elif request.param == "a socket":
        with socket.socket(socket.AF_UNIX) as listener:
            before = os.getcwd()
            os.chdir(tmp_path)  # the path of a socket is short
            listener.bind(path.name)
            os.chdir(before)
    elif request.param == "a folder":
        path.mkdir()
    return request.param, Path("/dev/null") if request.param == "a device" else path


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_refused_at_once(special: tuple[str, Path]) -> None:
    kind, path = special
    readers: list[Callable[[], object]] = [
        lambda: Cleaner(Cleaning(stop_words=str(path))),
        lambda: make_tokenizer(f"sentencepiece:{path}"),
    ]
    if kind != "a folder":
        readers += [
            lambda: list(documents(f"text:{path}")),
            lambda: list(documents(f"jsonl:{path}", "data.validation_source")),
            lambda: list(documents(f"parquet:{path}")),
        ]
    for reader in readers:
        with pytest.raises(ConfigError, match=rf"it is {kind}, not a regular file: ") as caught:
            reader()
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.timeout(60)
def test_a_pipe_of_the_shell_is_refused_by_the_command(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    command = f"{sys.executable} -m tfdp.prepare --tokenizer bytes --output {tmp_path}/out --source"
    for source in (f"text:<(cat {tmp_path}/a.txt)", "text:/dev/stdin"):
        line = f"cat {tmp_path}/a.txt | {command} {source}"
        result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=50)
        assert result.returncode == 2
        assert re.fullmatch(
            r"error: source: \S+ must be readable: it is a pipe, not a regular file: .*\n", result.stderr
        )


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a" * 300, "must match at least one file"),
        ("a" * 5000 + "/*.txt", "must match at least one file"),
        ("a/" * 3000, "must match at least one file"),
        ("a\0b*", "must be UTF-8 without NUL"),
        ("a\udcff*", "must be UTF-8 without NUL"),
        ("a\nb\x1b[31m", "must match at least one file"),
        ("~nobody-of-that-name/*", "must match at least one file"),
        ("[", "must match at least one file"),
    ],
)
def test_a_name_that_cannot_be_is_one_short_line(pattern: str, message: str) -> None:
    for kind in ("text", "jsonl", "parquet"):
        with pytest.raises(ConfigError, match=message) as caught:
            names(f"{kind}:{pattern}")
        line = str(caught.value)
        assert line.isprintable() and len(line) < 500

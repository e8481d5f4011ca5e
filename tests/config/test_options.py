"""Flags and files as values of their types."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from tfdp.config import parsing
from tfdp.config.options import whole_number
from tfdp.system.exits import ConfigError


@dataclass(frozen=True)
class Section:
    """A section of a recipe of one's own."""

    size: int
    weights: dict[str, float] = field(default_factory=dict)
    folder: Path = Path("here")
    names: list[str] = field(default_factory=list)
    pair: tuple[int, float] = (1, 2.0)


@dataclass(frozen=True)
class Mine:
    """A recipe of one's own."""

    section: Section = Section(size=3)
    flag: bool | Literal["auto"] = "auto"
    rate: float | None = None
    text: str | None = None
    positions: tuple[int, ...] = ()


def load(*argv: str) -> Mine:
    return parsing.load(Mine, argv, "mine", "Mine.")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], Mine()),
        (["--rate", "5"], Mine(rate=5.0)),
        (["--rate=null", "--text=null"], Mine()),
        (["--text", "012"], Mine(text="012")),
        (["--text", "- a list?"], Mine(text="- a list?")),
        (["--text=--flag"], Mine(text="--flag")),
        (["--text", "[a"], Mine(text="[a")),
        (["--flag", "true"], Mine(flag=True)),
        (["--positions", "[3, 1]"], Mine(positions=(3, 1))),
        (["--section.size", "1_000"], Mine(section=Section(size=1000))),
        (["--section.weights", "{a: 0.5}"], Mine(section=Section(3, weights={"a": 0.5}))),
        (["--section.folder", "there"], Mine(section=Section(3, folder=Path("there")))),
        (["--section.names", "[a, on]"], Mine(section=Section(3, names=["a", "on"]))),
        (["--section.pair", "[2, 3]"], Mine(section=Section(3, pair=(2, 3.0)))),
    ],
)
def test_a_flag_becomes_a_value_of_its_type(argv: list[str], expected: Mine) -> None:
    assert load(*argv) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rate", "1", "--rate", "2"], "rate (2) must be given once: it is 1 before"),
        (["--rate=1", "--text", "a", "--rate", "1.0"], "rate (1.0) must be given once: it is 1 before"),
        (["--section.size", "1:2"], "section.size (1:2) must be a whole number"),
        (["--section.size", "012"], "section.size (012) must be a whole number"),
        (["--section.size", "²"], "section.size (²) must be a whole number"),
        (["--section.size", "9" * 5000], "section.size (" + "9" * 40 + "..." + "9" * 37 + ") must be a whole number"),
        (["--rate", "9" * 400], "rate (a number of about 401 digits) must be a number or null"),
        (["--rate", "1e39"], "rate (1e+39) must be 0 or of a size from 1e-37 to 1e+37, which float32 can hold"),
        (["--rate", "1e-300"], "rate (1e-300) must be 0 or of a size from 1e-37 to 1e+37, which float32 can hold"),
        (["--rate", ""], "rate () must be a number or null"),
        (["--flag", "yes"], "flag (yes) must be true or false or one of auto"),
        (["--text", "caf\udce9"], r"text (caf\xe9) must be text in UTF-8"),
        (["--text", "nul\0"], r"text (nul\x00) must not hold the character NUL"),
        (["--positions", "[1, 1:2]"], "positions ([1, '1:2']) must be a list such as [1, 2]"),
        (
            ["--positions", "{a: 1, a: 2}"],
            "positions ({a: 1, a: 2}) must be a list such as [1, 2]: a stands in line 1 and in line 1: leave one out",
        ),
        (["--section.weights", "{a: b}"], "section.weights ({'a': 'b'}) must be of the type dict"),
        (["--text"], "text must be followed by a value: text or null"),
        (["--text", "--rate", "1"], "text must be followed by a value: text or null"),
        (["--\x1b[31m\n", "1"], r"unknown key \x1b[31m\n on the command line: --help lists the keys"),
    ],
)
def test_a_flag_that_is_wrong_is_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    assert str(caught.value) == message


def test_a_flag_may_be_repeated_with_the_same_value() -> None:
    assert load("--rate", "1", "--rate=1") == Mine(rate=1.0)


def test_a_file_gives_text_where_yaml_gave_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("text: 2026-01-02\nsection.names: [on, 'null']\nrate: '5'\n")
    assert load("--config", str(path)) == Mine(text="2026-01-02", rate=5.0, section=Section(3, names=["on", "null"]))


def test_a_key_without_a_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"^size \(null\) must be given: a whole number$"):
        parsing.load(Section, [], "mine", "Mine.")


@pytest.mark.parametrize(
    ("text", "number"), [("7", 7), ("007", 7), ("²", None), ("٣", None), ("", None), ("-1", None), ("9" * 19, None)]
)
def test_whole_numbers_are_ascii_digits(text: str, number: int | None) -> None:
    assert whole_number(text) == number


@dataclass(frozen=True)
class Data:
    """The section of a key that was renamed."""

    excluded_positions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Renamed:
    """A configuration with it."""

    data: Data = Data()


def test_the_earlier_name_of_a_key_works_and_tells_the_new_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text("data:\n  left_out: [7]\n")
    for argv in (["--data.left_out", "[7]"], [f"--config={tmp_path / 'a.yaml'}"]):
        config = parsing.load(Renamed, argv, "mine", "Mine.")
        assert config.data.excluded_positions == (7,)
        assert capsys.readouterr().err == "note: data.left_out is called data.excluded_positions now\n"
    (tmp_path / "b.yaml").write_text("data:\n  left_out: [7]\n  excluded_positions: [8]\n")
    with pytest.raises(ConfigError, match=r"data\.excluded_positions \(\[8\]\) must be given once in .*b\.yaml"):
        parsing.load(Renamed, [f"--config={tmp_path / 'b.yaml'}"], "mine", "Mine.")

"""The grammar of `PATTERN[:FIELD][:KEY=VALUE]`."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfdp.data.addresses import Address, parse
from tfdp.data.corpus import documents
from tfdp.system.exits import ConfigError


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("a.jsonl", Address("a.jsonl", None, None)),
        ("a.jsonl:body", Address("a.jsonl", "body", None)),
        ("a.jsonl:meta.title", Address("a.jsonl", "meta.title", None)),
        ("a.jsonl:label=good", Address("a.jsonl", None, ("label", "good"))),
        ("a.jsonl:body:label=very good", Address("a.jsonl", "body", ("label", "very good"))),
        ("a.jsonl:body:label=", Address("a.jsonl", "body", ("label", ""))),
        ("a.jsonl:a.b=c=d", Address("a.jsonl", None, ("a.b", "c=d"))),
        ('a.jsonl:size=5" disk', Address("a.jsonl", None, ("size", '5" disk'))),
        ("my files/*.jsonl:body", Address("my files/*.jsonl", "body", None)),
        ("label=1/*.jsonl", Address("label=1/*.jsonl", None, None)),
        ("x:label=1/*.jsonl", Address("x:label=1/*.jsonl", None, None)),
        ("x:a*.jsonl", Address("x:a*.jsonl", None, None)),
        ("dir[:]x=*.jsonl", Address("dir[:]x=*.jsonl", None, None)),
        ("a.jsonl:", Address("a.jsonl:", None, None)),
        (":a", Address(":a", None, None)),
        ("", Address("", None, None)),
    ],
)
def test_what_was_an_address_before_is_read_as_before(address: str, expected: Address) -> None:
    assert parse(address, "data.source") == expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ('a.jsonl:"Review Text"', Address("a.jsonl", "Review Text", None)),
        ('a.jsonl:"a:b/c"', Address("a.jsonl", "a:b/c", None)),
        ('a.jsonl:text:"my key"=good', Address("a.jsonl", "text", ("my key", "good"))),
        ('a.jsonl:time="2026-01-31T12:00:00"', Address("a.jsonl", None, ("time", "2026-01-31T12:00:00"))),
        ('a.jsonl:url="https://x/y:k=v"', Address("a.jsonl", None, ("url", "https://x/y:k=v"))),
        (r'a.jsonl:"\u00e9\"":"="="\n"', Address("a.jsonl", 'é"', ("=", "\n"))),
        ('a.jsonl:x="a:y="b"', Address('a.jsonl:x="a', None, ("y", "b"))),
    ],
)
def test_what_has_other_characters_stands_in_double_quotes(address: str, expected: Address) -> None:
    assert parse(address, "data.source") == expected


def test_double_quotes_hold_a_text_as_json_writes_it() -> None:
    with pytest.raises(ConfigError, match=r'^data.source: "\\x" must be a text as JSON writes it: Invalid'):
        parse(r'a.jsonl:"\x"', "data.source")


def test_what_is_left_and_is_a_file_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a:b", "a:k=v", "a:b:k=v"):
        (tmp_path / name).write_text("")
        assert parse(name, "") == Address(name, None, None)
        assert parse(f"~/{name}", "") == Address(f"~/{name}", None, None)
        assert parse(f"{name}:body:label=1", "") == Address(name, "body", ("label", "1"))


def before(address: str) -> Address:
    """How addresses were read before they had a grammar."""
    only = None
    if condition := re.fullmatch(r"(.+):([\w.-]+)=([^:/]*)", address):
        address, only = condition[1], (condition[2], condition[3])
    pattern, _, field = address.rpartition(":")
    named = bool(pattern and re.fullmatch(r"[\w.-]+", field))
    return Address(pattern, field, only) if named else Address(address, None, only)


@given(st.text(alphabet='ab.-_:=/*[] é"', max_size=20).filter(lambda text: text.count('"') < 2))
@settings(max_examples=2000, deadline=None)
def test_without_double_quotes_nothing_has_changed(address: str) -> None:
    assert parse(address, "data.source") == before(address)


SOURCES = st.builds(
    "{}{}".format,
    st.sampled_from(["text:", "jsonl:", "parquet:", "python-stdlib:", "txt:", "", "jsonl:no-such-folder/"]),
    st.text(
        alphabet=st.one_of(st.sampled_from('~:=/.*?[]!-"\\\0\n\x1b ²\udcff\ud800{}$+'), st.characters()), max_size=400
    ),
)


@pytest.mark.parametrize("count", [200, pytest.param(4000, marks=pytest.mark.slow)])
def test_any_source_is_one_short_line_or_text(
    count: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))

    @given(SOURCES)
    @settings(max_examples=count, deadline=2000)
    def read(source: str) -> None:
        try:
            next(iter(documents(source)), None)
        except ConfigError as error:
            assert str(error).isprintable() and len(str(error)) < 500

    read()

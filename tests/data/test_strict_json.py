"""JSON in which no key stands twice."""

import json

import pytest

from tfdp.data.strict_json import DuplicateKeyError, parse


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": [1, 2.5, -0, 1e400, null, true, {"a": "\\u00e9\xc3\xa9"}], "b": {"a": {}, "c": []}, "": ""}',
        b" 3 ",
        b'"\\ud800"',
        b'{"text": "a", "big": ' + b"9" * 400 + b"}",
        b"[" * 500 + b"]" * 500,
    ],
)
def test_values_are_those_of_json(data: bytes) -> None:
    assert parse(data) == json.loads(data)


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse(b'\xef\xbb\xbf{"a": "\xef\xbb\xbf"}') == {"a": "\ufeff"}


@pytest.mark.parametrize(
    ("data", "key"),
    [
        (b'{"a": 1, "a": 2}', "a"),
        (b'{"a" : 1,\n "b": "a", "\\u0061": 1}', "a"),
        (b'[{"b": [{"c d": 1, "a": {"e": 1}, "c d": 1}]}]', "c d"),
        (b'{"": 1, "": 1}', ""),
        (b'{"a\\nb": 1, "a\\nb": 1}', "a\\nb"),
    ],
)
def test_a_key_that_stands_twice_is_an_error(data: bytes, key: str) -> None:
    with pytest.raises(DuplicateKeyError) as caught:
        parse(data)
    assert str(caught.value) == f"the key {key} stands there twice: remove one"


@pytest.mark.parametrize("data", [b"", b"{", b"{} {}", b'{"a": 01}', b"\0", b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_no_json_is_an_error_of_one_line(data: bytes) -> None:
    with pytest.raises(ValueError) as caught:
        parse(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_what_is_no_utf8_names_the_byte() -> None:
    with pytest.raises(UnicodeDecodeError) as caught:
        parse(b'{"a": "\xff"}')
    assert caught.value.start == 7

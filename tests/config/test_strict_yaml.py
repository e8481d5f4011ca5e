"""YAML without surprises."""

import time
from pathlib import Path

import pytest

from tfdp.config.strict_yaml import loads, read
from tfdp.system.exits import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-3", -3),
        ("1_000", 1000),
        ("1e3", 1000.0),
        ("6e-4", 6e-4),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        ("true", True),
        ("~", None),
        ("null", None),
        ("", None),
        # What YAML 1.1 reads as a number, a truth value or a date
        ("1:2", "1:2"),
        ("012", "012"),
        ("0x10", "0x10"),
        ("0b1", "0b1"),
        ("yes", "yes"),
        ("on", "on"),
        ("2026-01-02", "2026-01-02"),
        ("1_0.5", "1_0.5"),
        ("²", "²"),
        ("'5'", "5"),
        ('"null"', "null"),
        ("[1, a, 2.5]", [1, "a", 2.5]),
        ("{a: 1, b: {c: null}}", {"a": 1, "b": {"c": None}}),
        ("1: 2", {"1": 2}),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("a: [{b: 1}, {b: 2}]", {"a": [{"b": 1}, {"b": 2}]}),
    ],
)
def test_values_are_what_they_look_like(text: str, value: object) -> None:
    found = loads(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmodel: {}\nseed: 2\n", "seed stands in line 1 and in line 3: leave one out"),
        ("seed: 1\nseed: 1\n", "seed stands in line 1 and in line 2: leave one out"),
        (
            "model:\n  num_layers: 2\n  num_heads: 1\n  num_layers: 3\n",
            "model.num_layers stands in line 2 and in line 4: leave one out",
        ),
        (
            "model: {num_layers: 2}\nmodel.num_layers: 3\n",
            "model.num_layers stands in line 1 and in line 2: leave one out",
        ),
        ("model: {a: 1}\nseed: 1\nmodel: {b: 1}\n", "model stands in line 1 and in line 3: leave one out"),
        ("a: {b: {c: 1,\n c: 2}}", "a.b.c stands in line 1 and in line 2: leave one out"),
        ("a: [{b: 1, b: 2}]", "a[0].b stands in line 1 and in line 1: leave one out"),
        ("? [1]\n: 2", "line 1: a key must be text"),
        (
            "a: !!python/object:os.system x",
            "line 1: the tag tag:yaml.org,2002:python/object:os.system has no meaning here",
        ),
        ("a: &a [*a]", "line 1: nested deeper than 20 levels"),
        ("<<: 3", "line 1: << must name a mapping, or a list of them"),
    ],
)
def test_what_says_two_things_or_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        loads(text)
    assert str(caught.value) == message


LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", ["[" * 2000, "[" * 2000 + "]" * 2000, "{a: " * 2000, "- " * 2000, LAUGHS])
def test_what_would_take_minutes_or_all_memory_is_refused_at_once(text: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"nested deeper|more than 100,000 values"):
        loads(text)
    assert time.monotonic() - started < 10  # 0.1 to 0.5 s; minutes and gigabytes otherwise


def test_a_file_is_named_with_its_mistake(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError) as caught:
        read(path)
    rule = "must be valid YAML: seed stands in line 1 and in line 2: leave one out"
    assert str(caught.value) == f"--config ({path}) {rule}"


@pytest.mark.parametrize("name", ["x" * 300 + ".yaml", "caf\udce9.yaml", "nul\0.yaml"])
def test_a_file_with_an_impossible_name_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^--config \([\x20-\x7e]+\) must be [\x20-\x7e]+$"):
        read(Path(name))

"""Made-up configurations, sources and command lines: each is read, or refused in one short line, at once."""

import contextlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tfdp import chat, evaluate, generate, plan, prepare, replay
from tfdp.config import parsing as config_module
from tfdp.config import source_syntax
from tfdp.config.parsing import known_keys, to_yaml
from tfdp.config.sections import DataConfig
from tfdp.data import corpus
from tfdp.launch import LaunchConfig
from tfdp.system.exits import ConfigError
from trainers.causal_lm import Config

ROOT = Path(__file__).parents[2]
CLASSES = [
    Config,
    LaunchConfig,
    chat.Config,
    evaluate.Config,
    generate.Config,
    plan.Config,
    prepare.Config,
    replay.Config,
]
KEYS = {cls: list(known_keys(cls)) for cls in CLASSES}
SECONDS = 2.0
FEW = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=1000)

WORTH_A_TRY = """0 1 -1 00 012 0x10 0o17 1_000 1e3 1e300 -1e300 1e-300 nan inf -inf .nan .inf null ~ true yes on off
1:2 ² ٣ ½ \x00 \x1b[31m \u202e \udce9 \ud800 [ ] { } [1,2] {a:1} {a:1,a:2} - -- --seed = : , # & * !
!!int !!python/none | > % @ ` ' " 9223372036854775807 9223372036854775808 -9223372036854775809
4294967296 2147483648 auto bytes bpe:² bpe:5 bpe:99999999 bpe: gpt2: gpt2:/none sentencepiece:/none
text: text:* jsonl:none:f parquet:none:a=b tfds: tokens:none 1*tokens:a 0.5 * text:a + 0.5 * text:b
../.. / . ~ ~none \\ ?? [a-] **/** latest best newest 7:8"""
LONG = [
    "9" * 400,
    "9" * 5000,
    "-" + "1" * 400,
    "[" * 2000,
    "{a: " * 500,
    "x" * 300,
    "text:" + "y" * 5000,
    "0." + "3" * 999,
]
WORDS = st.one_of(
    st.sampled_from([*WORTH_A_TRY.split(), *LONG, "", "\n", " "]),
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.integers(min_value=0, max_value=10**40).map(str),
)
VALUES = st.recursive(
    st.one_of(WORDS, st.none(), st.booleans(), st.integers(), st.floats()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=5,
)


def check(action: Callable[[], object]) -> None:
    """Runs an action that may be refused in one line or end as `--help` does, at once."""
    started, seconds = time.monotonic(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            action()
        except ConfigError as error:
            assert str(error).isprintable()
            assert 0 < len(str(error)) <= 500
        except SystemExit as end:
            assert end.code == 0
    assert time.process_time() - seconds < SECONDS, "seconds of this process, which a busy machine does not change"
    assert time.monotonic() - started < 30 * SECONDS


def load(cls: type, argv: list[str]) -> Any:
    return config_module.load(cls, argv, "python -m tfdp", "Fuzz.")


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[type, list[str]]:
    """A configuration class and flags for it, of which some are wrong."""
    cls = draw(st.sampled_from(CLASSES))
    names = st.one_of(st.sampled_from([*KEYS[cls], "config", "help", "print_config"]), WORDS)
    flags = draw(st.lists(st.tuples(names, WORDS, st.booleans()), min_size=1, max_size=4))
    argv = [
        part for name, value, joined in flags for part in ([f"--{name}={value}"] if joined else [f"--{name}", value])
    ]
    return cls, argv


@st.composite
def documents(draw: st.DrawFn) -> tuple[type, str]:
    """A configuration class and the text of a file for it."""
    import yaml

    cls = draw(st.sampled_from(CLASSES))
    if draw(st.booleans()):
        lines = draw(st.lists(st.tuples(st.sampled_from(KEYS[cls]), WORDS), min_size=1, max_size=4))
        return cls, "\n".join(f"{key}: {value}" for key, value in lines)
    content: dict[str, Any] = {}
    for key, value in draw(st.lists(st.tuples(st.sampled_from(KEYS[cls]), VALUES), min_size=1, max_size=4)):
        section, _, name = key.rpartition(".")
        (content.setdefault(section, {}) if section else content)[name] = value
    return cls, yaml.safe_dump(content, allow_unicode=draw(st.booleans()))


def check_command_line(case: tuple[type, list[str]]) -> None:
    check(lambda: load(*case))


def check_document(case: tuple[type, str], folder: Path) -> None:
    cls, text = case
    path = folder / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape") if "\ud800" not in text else b"\xed\xa0\x80")

    def read() -> None:
        config = load(cls, ["--config", str(path)])
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load(cls, ["--config", str(path)]) == config, "what is accepted can be written and read again"

    check(read)


def check_source(source: str, tokenizer: str) -> None:
    def read() -> None:
        DataConfig(source=source, tokenizer=tokenizer)
        for name, _ in source_syntax.parse(source):
            if not name.startswith(("tfds:", "python-stdlib")):
                list(corpus.documents(name))

    check(read)


SOURCES = st.one_of(
    WORDS,
    st.builds(
        "{}:{}{}".format,
        st.sampled_from(["text", "jsonl", "parquet", "tokens", "TEXT", "tfd", ""]),
        st.sampled_from(
            ["/none", "/none/*.txt", "/none/**/[", "/none/" + "x" * 300, "/none/" + "a/" * 3000, "none\0", ""]
        ),
        st.sampled_from(["", ":", ":field", ":a.b", ":k=v", ":f:k=v", "::", ":²"]),
    ),
    st.lists(st.builds("{} * {}".format, WORDS, WORDS), max_size=4).map(" + ".join),
)


@FEW
@given(case=command_lines())
def test_any_command_line_is_read_or_refused_in_one_line(case: tuple[type, list[str]]) -> None:
    check_command_line(case)


@pytest.mark.slow
@pytest.mark.timeout(900)
@MANY
@given(case=command_lines())
def test_many_command_lines_are_read_or_refused_in_one_line(case: tuple[type, list[str]]) -> None:
    check_command_line(case)


@FEW
@given(case=documents())
def test_any_file_is_read_or_refused_in_one_line(case: tuple[type, str], tmp_path: Path) -> None:
    check_document(case, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@MANY
@given(case=documents())
def test_many_files_are_read_or_refused_in_one_line(case: tuple[type, str], tmp_path: Path) -> None:
    check_document(case, tmp_path)


@FEW
@given(source=SOURCES, tokenizer=WORDS)
def test_any_source_is_read_or_refused_in_one_line(source: str, tokenizer: str) -> None:
    check_source(source, tokenizer)


@pytest.mark.slow
@pytest.mark.timeout(900)
@MANY
@given(source=SOURCES, tokenizer=WORDS)
def test_many_sources_are_read_or_refused_in_one_line(source: str, tokenizer: str) -> None:
    check_source(source, tokenizer)

"""Cleaning of documents, each step off by default.

The steps come in the order of the fields of `Cleaning`, except that control characters go first. What is clean stays
as it is: cleaning a second time changes nothing. Two orders would break that. A control character between a letter and
its accent must go before NFC joins the two, and compatibility forms turn some characters into spaces.
"""

import functools
import hashlib
import re
import sys
import unicodedata
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tfdp.data import inputs
from tfdp.system.exits import ConfigError, require
from tfdp.system.messages import shown

TOO_SHORT, TOO_LONG = "too short", "too long"

_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_CONTROL = "".join(map(chr, [*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0)]))
_CONTROL_RUN = re.compile(f"[{re.escape(_CONTROL)}]+")
_ASCII_CONTROL = _CONTROL.encode("ascii", "ignore")
_ASCII_WORD = re.compile(r"\w+(?:'\w+)*", re.ASCII)


@dataclass(frozen=True)
class Cleaning:
    """What happens to each document before it becomes tokens."""

    unicode: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = None
    """Unicode normalisation form of the text; null: as it is."""
    control_characters: bool = False
    """Whether control characters (category Cc) are removed, all but tab, line feed and carriage return; format
    characters such as the joiners of emoji stay."""
    stop_words: str | None = None
    """A UTF-8 file with one word a line, each removed from the text in any case; a word is a whole run of letters,
    digits, marks and underscores, with single apostrophes inside. The spaces around it stay: see whitespace."""
    whitespace: bool = False
    """Whether white space is tidied: CR LF and CR become LF, a run of spaces and tabs one space (indentation too), none
    at the end of a line, three or more LF become two, and spaces and LF go from both ends of the document."""
    min_chars: int | None = None
    """Documents with fewer characters after the steps above are skipped; null: no limit."""
    max_chars: int | None = None
    """Documents with more characters after the steps above are skipped; null: no limit."""
    duplicates: bool = False
    """Whether a document that equals an earlier one after the steps above is skipped."""

    def __post_init__(self) -> None:
        require(
            self.unicode is None or self.unicode in _FORMS,
            "cleaning.unicode",
            self.unicode,
            f"must be null or one of {', '.join(_FORMS)}: try NFC",
        )
        require(self.stop_words != "", "cleaning.stop_words", '""', "must be null or the path of a file of words")
        for name in ("min_chars", "max_chars"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"cleaning.{name}", value, "must be at least 1, or null for no limit")
        require(
            self.max_chars is None or self.min_chars is None or self.min_chars <= self.max_chars,
            "cleaning.min_chars",
            self.min_chars,
            f"must not exceed cleaning.max_chars ({self.max_chars}): try {self.max_chars}",
        )


class Cleaner:
    """Cleans one document after the other; can be sent to other processes.

    Raises:
      ConfigError: the file of stop words cannot be read, is not UTF-8, or has a line that is not one word.
    """

    def __init__(self, cleaning: Cleaning) -> None:
        self._cleaning = cleaning
        self._stop_words = frozenset(_read_stop_words(cleaning))

    def clean(self, text: str) -> tuple[str, str | None]:
        """The cleaned text, and why its document is skipped: `TOO_SHORT`, `TOO_LONG`, or None, which keeps it.

        The cleaned text may be empty. Duplicates are found by the caller, who sees all documents.
        """
        cleaning = self._cleaning
        if cleaning.control_characters:
            text = _without_control_characters(text)
        if cleaning.unicode:
            text = _normalise(text, cleaning.unicode)
        if self._stop_words:
            words = _ASCII_WORD if text.isascii() else _word_pattern()
            text = words.sub(self._unless_stop_word, text)
        if cleaning.whitespace:
            text = _tidy_whitespace(text)
        if cleaning.min_chars is not None and len(text) < cleaning.min_chars:
            return text, TOO_SHORT
        if cleaning.max_chars is not None and len(text) > cleaning.max_chars:
            return text, TOO_LONG
        return text, None

    def _unless_stop_word(self, match: re.Match[str]) -> str:
        word = match[0]
        return "" if _fold(word) in self._stop_words else word


def fingerprint(cleaning: Cleaning) -> dict[str, Any]:
    """All that the cleaned text depends on, for JSON: the fields that are on, a file by its SHA-256."""
    off = asdict(Cleaning())
    on = {name: value for name, value in asdict(cleaning).items() if value != off[name]}
    if cleaning.stop_words is not None:
        on["stop_words"] = {"sha256": hashlib.sha256(_read(cleaning.stop_words)).hexdigest()}
    return on


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    r"""A word: letters, digits, underscores and combining marks, which `\w` leaves out, with apostrophes inside.

    Were marks no part of it, x removed from "=x" + U+0338 would leave two characters that NFC joins.
    """
    marks = {code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M"}
    firsts = sorted(code for code in marks if code - 1 not in marks)
    lasts = sorted(code for code in marks if code + 1 not in marks)
    # As ranges, because a class of 2,400 single characters matches at a quarter of the speed.
    ranges = "".join(f"{chr(first)}-{chr(last)}" for first, last in zip(firsts, lasts, strict=True))
    return re.compile(rf"[\w{ranges}]+(?:['’][\w{ranges}]+)*")  # noqa: RUF001


def _without_control_characters(text: str) -> str:
    if text.isascii():  # several times as fast as the regular expression
        return text.encode("ascii").translate(None, _ASCII_CONTROL).decode("ascii")
    return _CONTROL_RUN.sub("", text)


def _normalise(text: str, form: Literal["NFC", "NFD", "NFKC", "NFKD"]) -> str:
    if text.isascii() or unicodedata.is_normalized(form, text):
        return text
    return unicodedata.normalize(form, text)


def _tidy_whitespace(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ")
    text = _shorten_runs(text, "  ", " ").replace(" \n", "\n")
    return _shorten_runs(text, "\n\n\n", "\n\n").strip(" \n")


def _shorten_runs(text: str, run: str, shorter: str) -> str:
    while run in text:  # each time a run loses a third at least
        text = text.replace(run, shorter)
    return text


def _fold(word: str) -> str:
    return word.casefold().replace("’", "'")  # noqa: RUF001


def _read_stop_words(cleaning: Cleaning) -> set[str]:
    if cleaning.stop_words is None:
        return set()
    where = f"cleaning.stop_words ({shown(inputs.path_of(cleaning.stop_words))})"
    try:
        lines = _read(cleaning.stop_words).decode("utf-8").removeprefix("\ufeff").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} must be UTF-8: {error.reason} at byte {error.start}") from None
    words = set()
    for number, line in enumerate(lines, 1):
        word = _normalise(line.strip(), cleaning.unicode) if cleaning.unicode else line.strip()
        if word and not _word_pattern().fullmatch(word):
            raise ConfigError(
                f"{where} must have one word a line, of letters and digits: line {number} is '{shown(word)}'"
            )
        words.add(_fold(word))
    words.discard("")
    if not words:
        raise ConfigError(f"{where} must have at least one word: give null for no stop words")
    return words


def _read(name: str) -> bytes:
    path = inputs.path_of(name)
    try:
        return inputs.read(path)
    except OSError as error:
        raise ConfigError(
            f"cleaning.stop_words ({shown(path)}) must be a file that can be read: {error.strerror}"
        ) from None

"""Cleaning: what each step leaves, what is a mistake in one line, and that a second time changes nothing."""

import hashlib
import itertools
import pickle
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tfdp.data.cleaning import TOO_LONG, TOO_SHORT, Cleaner, Cleaning, fingerprint
from tfdp.system.exits import ConfigError

E_ACUTE = "e\u0301"
TRICKY = (
    " \t\n\r\0\x0b\x0c\x1f\x7f\x85\xa0\u1680\u2028\u3000\ufeff\u200d"  # white space, controls, a joiner
    "\u0301\u0308\u0338\u0316\u0345\u093e\u09be\u3099"  # marks
    "aàäxXıİßſﬁ①½ÅΩ=<≠'’_0नি가각か゛豈𝅗𝅥👩"  # noqa: RUF001
)


def cleaned(text: str, **steps: Any) -> str:
    return Cleaner(Cleaning(**steps)).clean(text)[0]


@pytest.fixture
def stop_words(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text("\ufeffThe\r\n\n of \ndon't\ncafé\nx\na\n", encoding="utf-8")
    return str(path)


def random_texts(count: int, seed: int) -> list[str]:
    """Mostly characters that steps touch, some of all of Unicode, without halves of surrogate pairs."""
    rng = random.Random(seed)

    def character() -> str:
        if rng.random() < 0.8:
            return rng.choice(TRICKY)
        code = rng.choice([rng.randrange(0x3000), rng.randrange(0x110000)])
        return chr(code) if not 0xD800 <= code < 0xE000 else "\n"

    return ["".join(character() for _ in range(rng.randrange(40))) for _ in range(count)]


def test_everything_off_returns_the_text_itself() -> None:
    cleaner = Cleaner(Cleaning())
    for text in random_texts(200, seed=1):
        kept, reason = cleaner.clean(text)
        assert kept is text and reason is None
    assert fingerprint(Cleaning()) == {}


@pytest.mark.parametrize(
    ("form", "expected"),
    [("NFC", "é ﬁ\xa0½"), ("NFD", f"{E_ACUTE} ﬁ\xa0½"), ("NFKC", "é fi 1⁄2"), ("NFKD", f"{E_ACUTE} fi 1⁄2")],  # noqa: RUF001
)
@pytest.mark.parametrize("letter", ["é", E_ACUTE])
def test_unicode(form: str, expected: str, letter: str) -> None:
    assert cleaned(f"{letter} ﬁ\xa0½", unicode=form) == expected


def test_control_characters() -> None:
    family = "👩\u200d👧"
    text = "a\0b\tc\r\nd\x1b[0m\x7f\n\x0c"
    assert cleaned(text, control_characters=True) == "ab\tc\r\nd[0m\n"
    assert cleaned(f"{text}\x85{family}\ufeff", control_characters=True) == f"ab\tc\r\nd[0m\n{family}\ufeff"
    for text in random_texts(200, seed=2):
        expected = "".join(char for char in text if char in "\t\n\r" or unicodedata.category(char) != "Cc")
        assert cleaned(text, control_characters=True) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\n", "a\nb\nc"),
        ("  if x:\n    \treturn  1 \t\n", "if x:\n return 1"),
        ("a" + "\n" * 1000 + "b\n\nc\nd", "a\n\nb\n\nc\nd"),
        ("a \n \n\t\n b", "a\n\n b"),
        ("a" + " " * 1001 + "b", "a b"),
        ("\xa0a\xa0\xa0b\u3000", "\xa0a\xa0\xa0b\u3000"),
        (" \t\r\n ", ""),
        ("", ""),
    ],
)
def test_whitespace(text: str, expected: str) -> None:
    assert cleaned(text, whitespace=True) == expected


def test_stop_words_are_whole_words_in_any_case(stop_words: str) -> None:
    def without(text: str, **steps: Any) -> str:
        return cleaned(text, stop_words=stop_words, **steps)

    assert without("The end OF then, the_the the-the.") == " end  then, the_the -."
    assert without("The end of\nthe  day", whitespace=True) == "end\n day"
    assert without("DON'T don’t don'ts 'the' the's") == "  don'ts '' the's"  # noqa: RUF001
    assert without("CAFÉ caf cafés é") == " caf cafés é"
    assert without(f"caf{E_ACUTE} caf{E_ACUTE}s") == f"caf{E_ACUTE} caf{E_ACUTE}s"
    assert without("café", unicode="NFD") == without(f"caf{E_ACUTE}", unicode="NFC") == ""
    assert without("t\0he é", control_characters=True) == " é"
    assert without("=x\u0338 é") == "=x\u0338 é"


def test_length_is_that_of_the_cleaned_text() -> None:
    cleaner = Cleaner(Cleaning(whitespace=True, min_chars=3, max_chars=5))
    assert cleaner.clean("  ab  ") == ("ab", TOO_SHORT)
    assert cleaner.clean("a    b") == ("a b", None)
    assert cleaner.clean("abcde\n\n") == ("abcde", None)
    assert cleaner.clean("éééééé") == ("éééééé", TOO_LONG)
    assert Cleaner(Cleaning(min_chars=1)).clean("") == ("", TOO_SHORT)


@pytest.mark.parametrize("form", [None, "NFC", "NFD", "NFKC", "NFKD"])
def test_a_second_time_changes_nothing(form: Any, stop_words: str) -> None:
    texts = random_texts(2000, seed=3)
    changed = 0
    for controls, words, whitespace in itertools.product((False, True), (None, stop_words), (False, True)):
        cleaner = Cleaner(Cleaning(form, controls, words, whitespace))
        for text in texts:
            once, _ = cleaner.clean(text)
            assert cleaner.clean(once) == (once, None), ascii(text)
            assert form is None or unicodedata.is_normalized(form, once), ascii(text)
            changed += once != text
    assert changed > 2000


def test_a_cleaner_can_be_sent_to_another_process(stop_words: str) -> None:
    cleaner = Cleaner(Cleaning("NFKC", True, stop_words, True, 2, 20, True))
    copy = pickle.loads(pickle.dumps(cleaner))
    assert all(copy.clean(text) == cleaner.clean(text) for text in random_texts(200, seed=4))


def test_the_fingerprint_has_what_is_on(stop_words: str, tmp_path: Path) -> None:
    assert fingerprint(Cleaning(unicode="NFC", min_chars=5)) == {"unicode": "NFC", "min_chars": 5}
    digest = hashlib.sha256(Path(stop_words).read_bytes()).hexdigest()
    elsewhere = Path(stop_words).rename(tmp_path / "elsewhere.txt")
    cleaning = Cleaning(stop_words=str(elsewhere), duplicates=True)
    assert fingerprint(cleaning) == {"stop_words": {"sha256": digest}, "duplicates": True}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unicode": "nfc"}, "cleaning.unicode (nfc) must be null or one of NFC, NFD, NFKC, NFKD: try NFC"),
        ({"min_chars": 0}, "cleaning.min_chars (0) must be at least 1, or null for no limit"),
        ({"max_chars": -1}, "cleaning.max_chars (-1) must be at least 1, or null for no limit"),
        ({"min_chars": 9, "max_chars": 5}, "cleaning.min_chars (9) must not exceed cleaning.max_chars (5): try 5"),
        ({"stop_words": ""}, 'cleaning.stop_words ("") must be null or the path of a file of words'),
    ],
)
def test_mistakes_are_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Cleaning(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "must be a file that can be read: No such file or directory"),
        (b"the\n\xff\n", "must be UTF-8: invalid start byte at byte 4"),
        (b"the\nNew York\n", "must have one word a line, of letters and digits: line 2 is 'New York'"),
        (b"\n \n", "must have at least one word: give null for no stop words"),
    ],
)
def test_a_wrong_file_of_stop_words_is_named(tmp_path: Path, content: bytes | None, rule: str) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Cleaner(Cleaning(stop_words=str(path)))
    assert str(caught.value) == f"cleaning.stop_words ({path}) {rule}"


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "a\0b", "a\nb", "a\udcffb"])
def test_a_name_that_cannot_be_is_one_short_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^cleaning.stop_words \(.*\) must be a file that can be read: ") as caught:
        Cleaner(Cleaning(stop_words=name))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_stop_words_below_the_home_folder(stop_words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(stop_words).parent))
    assert cleaned("the end", stop_words="~/words.txt") == " end"

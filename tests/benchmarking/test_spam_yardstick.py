"""The yardstick of classification: what becomes of a mail, its splits, and the scores."""

import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "yardsticks"


def run(*arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, FOLDER / "spam.py", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def mail(subject: str, body: str, kind: str = "text/plain") -> str:
    head = "From a@b  Tue Jul 30 08:30:04 2002\nReceived: from relay.example\nX-Spam-Status: Yes\n"
    return f"{head}Subject: {subject}\nContent-Type: {kind}; charset=us-ascii\n\n{body}\n"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """As the package has them: 90 mails of ham and 60 of spam, some of which are alike."""
    names = [chr(ord("a") + n // 26) + chr(ord("a") + n % 26) for n in range(60)]
    mails = {f"easy-ham-1/{n}.txt": mail(f"Lunch {n}", f"Shall we meet, {n}?") for n in names}
    page = "<html><b>News</b> of {}</html>"
    mails |= {f"hard-ham-1/{n}.txt": mail(f"News {n}", page.format(n), "text/html") for n in names[:30]}
    mails |= {f"spam-2/{n}.txt": mail(f"Watch {n}", "Buy a cheap watch here today, " * 2 + n) for n in names}
    mails["easy-ham-2/again.txt"] = mail("LUNCH aa", "Shall we meet aa")
    for number, name in enumerate(names[:20]):  # the body of another mail under another subject
        mails[f"spam-1/{number}.txt"] = mail(f"Offer {name}", "Buy a cheap watch here today, " * 2 + name)
    with tarfile.open(tmp_path / "mails.tgz", "w:gz") as archive:
        for name, text in mails.items():
            path = tmp_path / "one.txt"
            path.write_text(text)
            archive.add(path, f"package/data/{name}")
    return tmp_path / "mails.tgz"


def test_mails_become_texts_without_headers_that_are_in_one_split(package: Path, tmp_path: Path) -> None:
    code, out, error = run("data", "--package", package, "--output", tmp_path / "data")
    assert code == 0, error
    assert "171 mails; 1 dropped" in out
    parts = {name: records(tmp_path / "data" / f"{name}.jsonl") for name in ("train", "valid", "test")}
    every = [each for part in parts.values() for each in part]
    assert {frozenset(each) for each in every} == {frozenset({"text", "label"})}
    assert not any("relay" in each["text"] or "X-Spam" in each["text"] or "<" in each["text"] for each in every)
    assert {"text": "News ab\n\nNews of ab", "label": "ham"} in every
    held = {each["text"].partition("\n\n")[2] for name in ("valid", "test") for each in parts[name]}
    assert not held & {each["text"].partition("\n\n")[2] for each in parts["train"] if each["label"] == "spam"}
    assert 15 < len(parts["test"]) < 55 and 1 < len(parts["valid"]) < 30

    code, _, error = run("thin", "--data", tmp_path / "data", "--output", tmp_path / "thin", "--share", "0.1")
    assert code == 0, error
    counts = Counter(each["label"] for each in records(tmp_path / "thin" / "train.jsonl"))
    assert counts["ham"] == Counter(each["label"] for each in parts["train"])["ham"]
    assert counts["spam"] == round(counts["ham"] / 9)


def test_scores_and_mistakes(tmp_path: Path) -> None:
    test, found = tmp_path / "test.jsonl", tmp_path / "found.jsonl"
    labels = ["ham"] * 6 + ["spam"] * 4
    test.write_text("".join(json.dumps({"text": "x", "label": label}) + "\n" for label in labels))
    predicted = ["ham"] * 5 + ["spam"] * 5
    lines = [json.dumps({"record": n, "label": label}) + "\n" for n, label in enumerate(predicted, 1)]
    found.write_text("".join(lines))
    code, out, error = run("score", "--predictions", found, "--test", test)
    assert code == 0, error
    assert "accuracy              90.00 %" in out and "macro F1              89.90 %" in out  # (10/11 + 8/9) / 2
    assert "ham: 5 right, 1 taken for spam; spam: 4 caught, 0 missed" in out
    assert run("score", "--predictions", found, "--test", test)[1] == out  # a fixed seed

    found.write_text("".join(lines[:-1]))
    code, out, error = run("score", "--predictions", found, "--test", test)
    assert code == 2 and error.count("\n") == 1 and "a line for each of the 10 records of the test file" in error
    found.write_text(json.dumps({"record": 1, "label": "eggs"}) + "\n" + "".join(lines[1:]))
    code, _, error = run("score", "--predictions", found, "--test", test)
    assert code == 2 and "label (eggs) must be one of ham, spam" in error
    code, _, error = run("data", "--output", tmp_path / "data", "--package", test)
    assert code == 2 and error.count("\n") == 1, error
    code, _, error = run("thin", "--data", tmp_path, "--output", tmp_path, "--share", "1")
    assert code == 2 and error.count("\n") == 1, error

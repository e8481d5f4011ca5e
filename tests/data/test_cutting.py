"""`cut_input`: the head of a prompt, its last tokens and what is learned stay; what cannot be cut so is counted."""

import json
from pathlib import Path

import numpy as np
import pytest

from tfdp.config.sections import DataConfig
from tfdp.data.cutting import BEFORE_ANSWER, cut_prompt
from tfdp.data.labels import label_room
from tfdp.data.sequences import WholeSequences, examples_of
from tfdp.data.shards import Split
from tfdp.data.sources import open_corpus
from tfdp.tasks.flags import ID_MASK, STARTS, UNSCORED

CONTEXT = 40
LONG = "abcdefghijklmnopqrstuvwxyz" * 3


def split_of(folder: Path, records: list[dict[str, object]], **keys: str) -> Split:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DataConfig(source=f"jsonl:{path}", validation_fraction=0.2, **keys)  # type: ignore[arg-type]
    return open_corpus(config, folder / "cache").sources[0].shards.train


def texts(sequences: WholeSequences) -> list[str]:
    """The rows, ends of text as `|`."""
    rows = sequences.rows(np.arange(sequences.num_sequences))
    return ["".join("|" if id == 255 else chr(id) for id in (row[row >= 0] & ID_MASK).tolist()) for row in rows]


def pairs(num: int = 20) -> list[dict[str, object]]:
    return [{"text": f"{n:02d} {LONG if n % 3 == 0 else 'short'}", "kind": f"k{n % 2}"} for n in range(num)]


@pytest.mark.parametrize("form", ["whole", "documents"])
def test_the_head_of_a_prompt_its_end_and_what_is_learned_stay(tmp_path: Path, form: str) -> None:
    split = split_of(tmp_path, pairs(), input_field="text", target_field="kind")
    rows = examples_of(split, CONTEXT, form, "cut_input")  # type: ignore[arg-type]
    found = texts(rows)
    long = [text for text in found if "abc" in text]
    assert rows.num_too_long == len(long) > 3 and rows.num_cut_at_start == 0
    for text in long:
        number = int(text[1:3])
        whole = f"|{number:02d} {LONG}\nk{number % 2}|"
        tail = BEFORE_ANSWER + 3  # the class and the end of text
        assert text == whole[: CONTEXT + 1 - tail] + whole[-tail:] and len(text) == CONTEXT + 1
    short = "".join(text[:-1] for text in found if "abc" not in text)
    assert short.count("short") == split.num_documents - len(long)
    content = rows.rows(np.arange(rows.num_sequences))
    assert rows.num_inputs == np.sum(content[:, 1:] >= 0)
    assert ((content >= 0) & (content & STARTS != 0)).sum() == split.num_documents
    cut = content[[("abc" in text) for text in found]]
    assert np.all(cut[:, 1:-3] & UNSCORED) and not np.any(cut[:, -3:] & UNSCORED)
    names = [name for row in range(rows.num_sequences) for name in rows.documents_of(row)]
    assert len(names) == len(set(names)) == split.num_documents
    order = np.random.default_rng(0).permutation(rows.num_sequences)
    np.testing.assert_array_equal(rows.rows(order), content[order])


def test_texts_of_all_classes_are_cut_alike_and_as_a_prompt_is(tmp_path: Path) -> None:
    labels = ("a", "longer")
    lengths = range(20, 60)
    records: list[dict[str, object]] = [{"text": LONG[:n], "kind": label} for n in lengths for label in labels]
    split = split_of(tmp_path, records, input_field="text", label_field="kind")
    room = label_room(labels)
    rows = examples_of(split, CONTEXT, "documents", "cut_input", room)
    kept: dict[str, set[str]] = {label: set() for label in labels}
    for text in texts(rows):
        prompt, _, label = text[:-1].rpartition("\n")
        kept[label].add(prompt)
    assert max(map(len, kept["a"])) == max(map(len, kept["longer"])) == CONTEXT - room  # and the line break
    expected = set()
    for length in lengths:
        ids = cut_prompt([255, *f"{LONG[:length]}\n".encode()], CONTEXT + 1 - room)
        expected.add("|" + bytes(ids[1:-1]).decode())
    assert kept["a"] | kept["longer"] <= expected
    packed = examples_of(split, CONTEXT, "whole", "cut_input", room)
    assert sorted(text.count("|") - 1 for text in texts(packed))[-1] == 1  # what is cut, or nearly, has its own row


def test_what_cannot_be_cut_so_loses_its_start_and_is_counted(tmp_path: Path) -> None:
    records = [{"text": "in", "kind": LONG if n % 4 == 0 else "k"} for n in range(16)]
    split = split_of(tmp_path, records, input_field="text", target_field="kind")
    rows, other = (examples_of(split, CONTEXT, "whole", rule) for rule in ("cut_input", "cut_start"))
    assert rows.num_too_long == rows.num_cut_at_start == other.num_too_long > 0
    assert texts(rows) == texts(other)

    talk = [{"role": role, "content": LONG} for role in ("user", "assistant")]
    (tmp_path / "b").mkdir()
    split = split_of(tmp_path / "b", [{"m": talk * (1 + n % 2)} for n in range(16)], messages_field="m")
    rows, other = (examples_of(split, 120, "whole", rule) for rule in ("cut_input", "cut_start"))
    alike = sum(one == two for one, two in zip(texts(rows), texts(other), strict=True))
    assert 0 < alike == rows.num_cut_at_start < rows.num_too_long == split.num_documents


@pytest.mark.parametrize("most", [1, 2, 8, 9, 10, 30])
def test_a_prompt_has_at_most_so_many_tokens(most: int) -> None:
    ids = list(range(20))
    found = cut_prompt(ids, most)
    assert len(found) == min(most, 20) and found[0] == 0
    assert most == 1 or found[-1] == 19
    assert most < 9 or found[-BEFORE_ANSWER:] == ids[-BEFORE_ANSWER:]


def test_the_room_of_labels_holds_any_of_them() -> None:
    assert label_room(["ham", "Käse"]) == 7 and label_room([]) == 2

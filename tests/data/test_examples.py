"""Examples: fields become one text with marks, the marks become flags of ids, and rows hold whole examples."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tfdp.config.sections import DataConfig
from tfdp.data import examples
from tfdp.data.chat import JinjaTemplate
from tfdp.data.examples import BEGIN, END, ExampleKeys, make_form
from tfdp.data.labels import count_labels, label_ids
from tfdp.data.sequences import WholeSequences, examples_of
from tfdp.data.shards import Split, TokenShards
from tfdp.data.sources import open_corpus
from tfdp.system.exits import ConfigError
from tfdp.tasks.flags import ID_MASK, STARTS, UNSCORED

PAIRS = [{"question": f"{a}+1=", "answer": str(a + 1), "kind": a % 2} for a in range(40)]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye."},
]


def open_shards(folder: Path, records: list[dict[str, Any]], **keys: Any) -> TokenShards:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DataConfig(source=f"jsonl:{path}", validation_fraction=0.2, **keys)
    return open_corpus(config, folder / "cache").sources[0].shards


def texts_of(shards: TokenShards, split: Split, index: int) -> tuple[str, str]:
    """What is seen and what is learned of a document."""
    start = int(split.document_starts[index])
    stop = int(np.append(split.document_starts, split.num_tokens)[index + 1])
    (row,) = split.read(np.array([start]), np.array([stop - start]), stop - start, with_flags=True)
    is_learned = row & UNSCORED == 0
    return tuple(shards.tokenizer.decode(row[each] & ID_MASK) for each in (~is_learned, is_learned))  # type: ignore[return-value]


def test_pairs_become_a_prompt_that_is_seen_and_an_answer_that_is_learned(tmp_path: Path) -> None:
    keys = {"input_field": "question", "target_field": "answer", "template": "Q {input} A {target}."}
    shards = open_shards(tmp_path, PAIRS, **keys)
    found = {texts_of(shards, shards.train, index) for index in range(shards.train.num_documents)}
    expected = {(f"Q {each['question']} A ", f"{each['answer']}.\n\n") for each in PAIRS}  # and the end of text
    assert found < expected and len(found) == shards.train.num_documents > 25
    assert shards.train.num_bytes == sum(len("".join(each).strip().encode()) for each in found)
    plain = shards.train.read(np.array([0]), np.array([50]), 50)
    assert plain.min() >= 0 and plain.max() < 256  # who asks for no flags gets ids


def test_labels_of_any_type_are_texts(tmp_path: Path) -> None:
    shards = open_shards(tmp_path, PAIRS, input_field="question", label_field="kind")
    assert {texts_of(shards, shards.train, index)[1] for index in range(20)} == {"0\n\n", "1\n\n"}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "auto",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            f"{BEGIN}Hello!<|im_end|>{END}\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
            f"{BEGIN}Bye.<|im_end|>{END}",
        ),
        (
            '{"system": "({content}) ", "user": "U:{content} ", "assistant": "A:{content}; "}',
            f"(Be brief.) U:Hi A:{BEGIN}Hello!;{END} U:Bye A:{BEGIN}Bye.;{END}",
        ),
    ],
)
def test_what_the_assistant_says_is_learned_with_its_end(template: str, expected: str) -> None:
    form = make_form(ExampleKeys(template=template, messages_field="messages"), "bytes", "data.")
    assert form is not None
    assert form.text([CHAT], "line 1, field") == expected
    assert form.text([json.dumps(CHAT)], "line 1, field") == expected  # as a column of a CSV has it


def test_marks_are_taken_apart_as_they_were_put() -> None:
    text = f"a{BEGIN}b{END}c{BEGIN}d{END}"
    assert examples.split(text) == [("a", False), ("b", True), ("c", False), ("d", True)]
    assert examples.split("plain") == [("plain", False)] and examples.unmarked(text) == "abcd"


PAIR = {"input_field": "a", "target_field": "b"}
TALK = {"messages_field": "m"}


@pytest.mark.parametrize(
    ("records", "keys", "message"),
    [
        ([{"a": "x"}], PAIR, "line 1, must have the field b: it has a"),
        ([{"a": "x", "b": "1"}, {"a": "x", "b": " "}], PAIR, "line 2, field b must not be empty"),
        ([{"a": 1, "b": "1"}], PAIR, "line 1, field a must be text, and is int"),
        ([{"a": f"x{BEGIN}", "b": "1"}], PAIR, "field a must not hold U+FDD0"),
        ([{"m": []}], TALK, "line 1, field m must be a list of messages"),
        ([{"m": "[1"}], TALK, "line 1, field m must be a list of messages: "),
        ([{"m": [{"role": "robot", "content": ""}]}], TALK, "message 1, role (robot) must be one of system, user,"),
        ([{"m": [{"role": "user"}]}], TALK, "message 1, must have a role and a content"),
        ([{"m": [{"role": "user", "content": "x"}]}], TALK, "field m must have a message of the assistant"),
        ([{"m": [{"role": "assistant", "content": " "}]}], TALK, "message 1, content must not be empty"),
        ([], {"input_field": "a"}, "data.input_field (a) needs data.target_field, data.label_field or"),
        ([], {**TALK, "target_field": "b"}, "data.target_field (b) must be null with data.messages_field"),
        ([], {**PAIR, "label_field": "c"}, "data.label_field (c) must be null with data.target_field"),
        ([], {**PAIR, "template": "{input}"}, "must have {target} once: what is learned"),
        ([], {**PAIR, "template": "{input} {target} {c}"}, "must have the field b"),
        ([], {"target_field": "b", "template": "{target!r}"}, "must have plain fields alone"),
        ([], {"target_field": "b", "template": "{target"}, "must be a format string: expected '}'"),
        ([], {"target_field": "b"}, "needs data.input_field: the field that {input} stands for"),
        ([], {**TALK, "template": "tokenizer"}, "needs a tokenizer with a chat template: try chatml"),
        ([], {**TALK, "template": "{content}"}, "must be auto, chatml, tokenizer, or a text for each role"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, records: list[dict[str, Any]], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        open_shards(tmp_path, records or [{"a": "x"}], **keys)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("named", ["a", "text"])  # the second is what is read where no field is named
def test_a_field_beside_those_of_examples_is_refused(tmp_path: Path, named: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "x", "b": "y", "text": "z"}\n')
    config = DataConfig(source=f"jsonl:{tmp_path}/a.jsonl:{named}", input_field="a", target_field="b")
    with pytest.raises(ConfigError, match=r"must name no field: data\.input_field and its like do"):
        open_corpus(config, tmp_path / "cache")


def test_rows_hold_whole_examples_and_say_where_each_begins(tmp_path: Path) -> None:
    shards = open_shards(tmp_path, PAIRS, input_field="question", target_field="answer")
    split = shards.train
    rows = examples_of(split, 24, "whole", "refuse")
    content = rows.rows(np.arange(rows.num_sequences))
    assert content.shape == (rows.num_sequences, 25)
    starts = (content >= 0) & (content & STARTS != 0)
    assert starts.sum() == split.num_documents and starts[:, 0].all()  # each once, and no row begins inside of one
    assert np.all((content[starts] & ID_MASK) == shards.tokenizer.end_of_text)
    ends = (content[:, 1:] & ID_MASK == shards.tokenizer.end_of_text) & (content[:, 1:] >= 0)
    assert ends.sum() == split.num_documents and np.all(content[:, 1:][ends] & UNSCORED == 0)  # learned, all of them
    names = [name for row in range(rows.num_sequences) for name in rows.documents_of(row)]
    assert len(names) == len(set(names)) == split.num_documents
    alone = examples_of(split, 24, "documents", "refuse")
    assert alone.num_sequences == split.num_documents
    assert all(len(alone.documents_of(row)) == 1 for row in range(alone.num_sequences))


@pytest.mark.parametrize("packs", [False, True])
def test_what_is_too_long_is_cut_or_left_out_and_counted(tmp_path: Path, packs: bool) -> None:
    records = [{**each, "question": "?" * 30 if index % 10 == 0 else "?"} for index, each in enumerate(PAIRS)]
    split = open_shards(tmp_path, records, input_field="question", target_field="answer").train
    whole = [WholeSequences(split, 12, packs, rule) for rule in ("cut_start", "cut_end", "skip")]  # type: ignore[arg-type]
    assert {each.num_too_long for each in whole} == {sum("?" * 30 in each for each in _documents(split))} != {0}
    start, end, skip = (each.rows(np.arange(each.num_sequences)) for each in whole)
    long = [row for row in start if row[0] == ord("?")]
    assert len(long) == whole[0].num_too_long and all(row[-1] == 255 for row in long)
    assert sum(np.all(row[1:] == ord("?")) for row in end) == whole[0].num_too_long
    names = {name for row in range(len(skip)) for name in whole[2].documents_of(row)}
    assert len(names) == split.num_documents - whole[2].num_too_long
    with pytest.raises(ConfigError, match=r"data.too_long \(refuse\): records.jsonl:\d+ has \d+ tokens, and"):
        WholeSequences(split, 12, packs, "refuse")


def _documents(split: Split) -> list[str]:
    starts = np.append(split.document_starts, split.num_tokens)
    rows = (
        split.read(starts[i : i + 1], starts[i + 1 : i + 2] - starts[i : i + 1], 64)[0] for i in range(len(starts) - 1)
    )
    return [bytes(row[row >= 0].astype(np.uint8)).decode(errors="ignore") for row in rows]


def test_tables_of_text_are_read_as_json_lines_are(tmp_path: Path) -> None:
    for name, delimiter in (("a.csv", ","), ("b.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            rows = csv.DictWriter(file, ["question", "answer", "note"], delimiter=delimiter)
            rows.writeheader()
            rows.writerows({"question": f'"{i}"\nof, {delimiter}', "answer": str(i), "note": i % 2} for i in range(30))
        config = DataConfig(source=f"csv:{tmp_path}/{name}:note=1", input_field="question", target_field="answer")
        shards = open_corpus(config, tmp_path / "cache").sources[0].shards
        assert shards.train.num_documents + shards.validation.num_documents == 15
        seen, learned = texts_of(shards, shards.train, 0)
        assert seen == f'"1"\nof, {delimiter}\n' and learned == "1\n\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,b\n1,2\n3\n", "line 3, must have 2 columns, as the first row has, and has 1"),
        ("a,b\n1,2\n", "must have the column text once in its first row: it has a, b"),
        ("text,text\n1,2\n", "must have the column text once in its first row: it has it 2 times"),
        ('text\n"1\n', "must be a row of a table: unexpected end of data"),
        ("", "must have the column text once in its first row: it has none"),
    ],
)
def test_a_table_that_is_none_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ConfigError) as caught:
        open_corpus(DataConfig(source=f"csv:{tmp_path}/a.csv"), tmp_path / "cache")
    assert message in str(caught.value)


def test_a_template_of_a_folder_that_fails_is_one_line_and_none_knows_the_date() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    date = "{{ strftime_now('%Y') if strftime_now is defined else '2024' }}"
    assert JinjaTemplate(date, {}).render(messages, False, "line 1") == "2024"
    for source in ("{% for", "{{ messages[0].a.b }}", "{{ raise_exception('no') }}", "{{ messages['x' * 3] + 1 }}"):
        with pytest.raises(ConfigError, match="line 1: the chat template of the tokenizer refuses it: "):
            JinjaTemplate(source, {}).render(messages, False, "line 1")


def test_labels_are_counted_and_a_strange_one_is_named(tmp_path: Path) -> None:
    shards = open_shards(tmp_path, PAIRS, input_field="question", label_field="kind", template="{label}{input}")
    with pytest.raises(ConfigError, match=r"labels \(0, 1\) must hold the label of each example, but not that of rec"):
        count_labels(shards.train, ["0", "1"], label_ids(["0", "1"], shards.tokenizer))
    shards = open_shards(tmp_path, PAIRS, input_field="question", label_field="kind")
    counts = count_labels(shards.train, ["0", "1"], label_ids(["0", "1"], shards.tokenizer))
    kinds = [texts_of(shards, shards.train, index)[1][0] for index in range(shards.train.num_documents)]
    assert counts.tolist() == [kinds.count("0"), kinds.count("1")]
    with pytest.raises(ConfigError, match="but not that of"):
        count_labels(shards.train, ["0", "long name"], label_ids(["0", "long name"], shards.tokenizer))

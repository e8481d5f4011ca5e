"""Examples from TensorFlow Datasets: features of every kind as fields of records, through a real prepared data set."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tfdp.config.sections import DataConfig
from tfdp.data import datasets
from tfdp.data.corpus import documents
from tfdp.data.examples import BEGIN, END, ExampleKeys, make_form
from tfdp.data.sources import open_corpus
from tfdp.system.exits import ConfigError

TALK = [
    {"role": "user", "content": "Hi, 👩‍👧"},
    {"role": "assistant", "content": "Hello\n"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye."},
]
KINDS: dict[str, Any] = {
    "question": tfds.features.Text(),
    "answer": tfds.features.Text(),
    "mood": tfds.features.ClassLabel(names=["good", "bad"]),
    "stars": tfds.features.ClassLabel(num_classes=5),
    "id": tfds.features.Scalar(np.int64),
    "half": tfds.features.Scalar(np.float32),
    "is_new": tfds.features.Scalar(np.bool_),
    "scores": tfds.features.Tensor(shape=(2,), dtype=np.float64),
    "messages": tfds.features.Sequence(
        {
            "role": tfds.features.ClassLabel(names=["system", "user", "assistant"]),
            "content": tfds.features.Text(),
        }
    ),
    "steps": tfds.features.Dataset({"content": tfds.features.Text()}),
    "talk": tfds.features.Text(),
    "pair": tfds.features.Translation(languages=["en", "de"]),
    "meta": {"title": tfds.features.Text(), "size": np.int32},
    "tags": tfds.features.Sequence(tfds.features.Text()),
    "groups": tfds.features.Sequence(tfds.features.Sequence(tfds.features.Text())),
    "count": tfds.features.Scalar(np.int64, optional=True),
    "image": tfds.features.Image(shape=(1, 1, 3)),
}


def record(number: int) -> dict[str, Any]:
    turns = TALK[: 2 + 2 * (number % 2)]
    return {
        "question": f"{number}+1=, où?",
        "answer": str(number + 1),
        "mood": number % 2,
        "stars": number % 5,
        "id": number,
        "half": number / 2,
        "is_new": number % 2 == 0,
        "scores": [0.5, number],
        "messages": turns,
        "steps": [{"content": each["content"]} for each in turns],
        "talk": json.dumps(turns),
        "pair": {"en": f"text {number}", "de": f"Text {number}"},
        "meta": {"title": f"title {number}", "size": number},
        "tags": ["a", "é"][: number % 3],
        "groups": [["a"] * (number % 3), ["b"]],
        "count": number,
        "image": np.zeros((1, 1, 3), np.uint8),
    }


WRONG = {"bytes": {"question": b"\xff"}, "none": {"mood": -1}, "empty": {"answer": " "}, "missing": {"count": None}}


class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    VERSION = tfds.core.Version("1.0.0")
    name = "records"

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(KINDS))

    def _split_generators(self, _: object) -> dict[str, object]:
        return {name: self._generate_examples(name) for name in ("train", *WRONG)}

    def _generate_examples(self, split: str) -> object:
        if split == "train":
            return ((number, record(number)) for number in range(30))
        return iter([(0, record(0)), (1, {**record(1), **WRONG[split]})])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    builder = Records(data_dir=tmp_path_factory.mktemp("tfds"))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return Path(builder.data_dir)


def read(prepared: Path, fields: list[str], split: str = "train") -> list[list[Any]]:
    """The values of records, in the process that tests."""
    address = f"{prepared}:{split}"
    wanted = datasets.parse(address, "data.source")
    return [json.loads(each) for each in datasets._read(wanted, "data.source", address, fields)]


def test_features_of_every_kind_are_what_json_has(prepared: Path) -> None:
    fields = [name for name in KINDS if name != "image"] + ["meta.title", "pair.de"]
    found = sorted(read(prepared, fields), key=lambda values: values[fields.index("id")])
    for number, values in enumerate(found):
        expected = record(number)
        named = {"mood": ["good", "bad"][number % 2], "meta.title": f"title {number}", "pair.de": f"Text {number}"}
        assert dict(zip(fields, values, strict=True)) == {
            **{name: value for name, value in expected.items() if name in fields},
            **named,
        }
        assert [type(value) for value in values[3:7]] == [int, int, float, bool]
    assert len(found) == 30


@pytest.mark.parametrize(
    ("fields", "split", "message"),
    [
        (["question", "reply"], "train", "must have the field reply: it has answer, count, groups, "),
        (["meta.author"], "train", "must have the field meta.author: it has "),
        (["messages.role"], "train", "must have the field messages.role: it has "),  # of a list
        (["image"], "train", "field image must be text, classes, numbers, truth values, or lists or objects of these"),
        (["question"], "bytes", "example {}, field question must be UTF-8: invalid start byte at byte 0"),
        (["mood"], "none", "example {}, field mood must have a class, and has none (-1)"),
        (["count"], "missing", "example {}, field count must have a value, and has none (-9223372036854775808)"),
    ],
)
def test_what_is_not_there_or_no_value_is_one_line(prepared: Path, fields: list[str], split: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(prepared, fields, split)
    numbered = [f"data.source (tfds:{prepared}:{split})", *(message.format(number) for number in (0, 1))]
    assert numbered[0] in str(caught.value) and any(each in str(caught.value) for each in numbered[1:])
    assert str(caught.value).isprintable()


def test_a_split_gives_the_documents_that_json_lines_give(prepared: Path, tmp_path: Path) -> None:
    fields = ["question", "answer", "stars", "is_new", "id", "talk"]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(dict(zip(fields, values, strict=True))) + "\n" for values in read(prepared, fields))
    )
    keys = ExampleKeys("{input}? {target}.", "question", "answer")
    form = make_form(keys, "bytes", "data.")
    found = list(documents(f"tfds:{prepared}", form=form))
    assert [each.text for each in found] == [each.text for each in documents(f"jsonl:{tmp_path}/a.jsonl", form=form)]
    assert [each.name for each in found] == [str(number) for number in range(30)]
    assert sorted(each.text for each in found) == sorted(
        f"{number}+1=, où?? {BEGIN}{number + 1}.{END}" for number in range(30)
    )


def test_messages_become_examples_in_a_cache(prepared: Path, tmp_path: Path) -> None:
    config = DataConfig(source=f"tfds:{prepared}:train", validation_fraction=0.2, messages_field="messages")
    (source,) = open_corpus(config, tmp_path / "cache").sources
    train, validation = source.shards.train, source.shards.validation
    assert train.num_documents + validation.num_documents == 30 and train.has_flags
    (row,) = train.read(np.array([0]), np.array([2000]), 2000)
    text = source.shards.tokenizer.decode(row[row >= 0])
    assert "user\nHi, 👩‍👧<|im_end|>" in text and "assistant\nBye.<|im_end|>" in text


@pytest.mark.parametrize(
    ("address", "keys", "message"),
    [
        ("{}:train:question", {"target_field": "answer"}, "must name no field: data.input_field and its like do"),
        ("{}:empty", {"target_field": "answer"}, r"\), example \d, field answer must not be empty: it is what is"),
        ("{}", {"target_field": "reply"}, r"\) must have the field reply: it has answer, count, groups, "),
        ("{}", {"target_field": "id"}, r"\), example 0, field id must be text, and is int"),
    ],
)
def test_a_mistake_in_a_source_of_examples_is_one_line(
    prepared: Path, address: str, keys: dict[str, str], message: str
) -> None:
    form = make_form(ExampleKeys(**{"input_field": "question", **keys}), "bytes", "data.")
    with pytest.raises(ConfigError, match=message) as caught:
        list(documents(f"tfds:{address.format(prepared)}", form=form))
    assert "data.source (tfds:" in str(caught.value) and "\n" not in str(caught.value)

"""Text from TensorFlow Datasets, through its real builders on local data."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from tfdp.data.corpus import documents
from tfdp.data.datasets import Address, parse
from tfdp.system.exits import ConfigError
from trainers import causal_lm
from trainers.causal_lm import Config

TEXTS = [f"text {number}, with é, 👩‍👧 and\r\n" for number in range(40)]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of several shards, with a text, a second text and a number."""
    folder = tmp_path_factory.mktemp("tfds")

    class Letters(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "text": tfds.features.Text(),
                "title": tfds.features.Text(),
                "id": tfds.features.Scalar(np.int64),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _: object) -> dict[str, object]:
            return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(TEXTS[:5])}

        def _generate_examples(self, texts: list[str]) -> object:
            for number, text in enumerate(texts):
                yield number, {"text": text, "title": f"title {number}", "id": number}

    builder = Letters(data_dir=folder)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    assert builder.info.splits["train"].num_shards == 4
    return Path(builder.data_dir)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("lm1b", Address("lm1b", "train", None)),
        ("lm1b:1.1.0", Address("lm1b:1.1.0", "train", None)),
        ("wikipedia/20230601.en:train[:90%]", Address("wikipedia/20230601.en", "train[:90%]", None)),
        ("wikipedia/20230601.en:1.0.0:train[10%:]:text", Address("wikipedia/20230601.en:1.0.0", "train[10%:]", "text")),
        ("a:test:title", Address("a", "test", "title")),
    ],
)
def test_addresses(address: str, expected: Address) -> None:
    assert parse(address, "data.source") == expected


@pytest.mark.parametrize("address", ["", "a:b:c:d", ":train", "a:b:c:d\n" + "e" * 1000])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError, match=r"must be tfds:NAME") as caught:
        parse(address, "data.source")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_a_prepared_folder_below_the_home_folder(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(prepared.parent))
    assert sorted(document.text for document in documents(f"tfds:~/{prepared.name}:test")) == sorted(TEXTS[:5])


def test_a_split_is_read_whole_in_a_fixed_order(prepared: Path) -> None:
    found = [document.text for document in documents(f"tfds:{prepared}")]
    assert sorted(found) == sorted(TEXTS)
    assert [document.text for document in documents(f"tfds:{prepared}:train:text")] == found
    half = list(documents(f"tfds:{prepared}:train[:50%]"))
    assert [document.text for document in half] == found[:20]
    assert [document.name for document in half] == [str(number) for number in range(20)]
    assert {document.text for document in documents(f"tfds:{prepared}:test:title")} == {
        f"title {number}" for number in range(5)
    }


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("{}:dev", r"must name a split of (train, test|test, train), or a slice of one"),
        ("{}:train:id", r"must name a feature that is text, of .*title"),
        ("tiny_shakespear", r"must be a data set of TensorFlow Datasets: did you mean .*tiny_shakespeare"),
    ],
)
def test_mistakes_are_one_line(prepared: Path, address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        list(documents(f"tfds:{address.format(prepared)}"))
    assert "\n" not in str(caught.value)


def test_without_a_network_it_fails_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"is not prepared in .*, and could not be downloaded .*copy the folder"):
        list(documents("tfds:tiny_shakespeare"))
    assert time.monotonic() - started < 30  # 10 on a machine with nothing else to do


@pytest.mark.slow
def test_a_prepared_data_set_and_a_folder_of_parquet_train_the_same(
    tiny_config: Callable[..., Config], prepared: Path, tmp_path: Path
) -> None:
    texts = [document.text for document in documents(f"tfds:{prepared}:train")]
    for number in range(4):
        table = pyarrow.table({"id": range(10), "body": texts[number * 10 : number * 10 + 10]})
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet")
    held_out = {"validation_source": f"tfds:{prepared}:test:title"}
    summaries = [
        causal_lm.train(tiny_config(name, data={"source": source, **held_out}, training={"steps": 5}))
        for name, source in (("tfds", f"tfds:{prepared}:train"), ("parquet", f"parquet:{tmp_path}/*.parquet:body"))
    ]
    same = ("weights_sha256", "state_sha256", "train_loss", "validation_loss", "validation_bits_per_byte")
    assert {key: summaries[0][key] for key in same} == {key: summaries[1][key] for key in same}

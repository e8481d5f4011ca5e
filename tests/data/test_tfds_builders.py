"""The data sets that users name, through their real builders: tiny_shakespeare, lm1b and wikipedia.

Nothing of TensorFlow Datasets is replaced in the process that reads. A test puts a small file of the real format where
the download manager keeps what it has already downloaded: a path made of the address and the registered checksum,
which is taken as it lies there. What the builder does from there on is what it does with the real file.
"""

import bz2
import hashlib
import importlib.util
import io
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums, resource
from tensorflow_datasets.text.wikipedia import Wikipedia

from tfdp.data import datasets
from tfdp.data.corpus import documents
from tfdp.system.exits import ConfigError

PACKAGES = ("apache_beam", "mwparserfromhell", "mwxml")  # that wikipedia's builder imports
MISSING = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of data sets, on a machine without a network."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path


def _downloaded(folder: Path, name: str, url: str, content: bytes) -> None:
    """Puts a file where the builder of a data set looks for one that is downloaded already."""
    registered = {**checksums.get_all_url_infos(), **tfds.builder_cls(name).url_infos}[url]
    path = folder / "downloads" / name / resource.get_dl_fname(url, registered.checksum)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    about = {"original_fname": url.rpartition("/")[2], "url_info": registered.asdict(), "urls": [url]}
    Path(f"{path}.INFO").write_text(json.dumps(about), encoding="utf-8")


def _stored(split: str, examples: dict[str, str]) -> list[str]:
    """The texts in the order in which TensorFlow Datasets stores a split: by the MD5 of its name and their keys."""
    return [examples[key] for key in sorted(examples, key=lambda key: hashlib.md5(f"{split}{key}".encode()).digest())]


def _texts(source: str) -> list[str]:
    found = list(documents(source, "data.source"))
    assert [document.name for document in found] == [str(number) for number in range(len(found))]
    return [document.text for document in found]


@pytest.mark.slow
def test_tiny_shakespeare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # prints much more to stderr than a pipe holds
    text = "".join(f"ROMEO:\nLine {number}, où?\n\n" for number in range(50))
    _downloaded(folder, "tiny_shakespeare", SHAKESPEARE, text.encode())
    first = int(len(text) * 0.9)
    second = first + int((len(text) - first) * 0.5)
    expected = [text[:first], text[first:second], text[second:]]
    assert _texts("tfds:tiny_shakespeare:train+validation+test") == expected
    assert (folder / "tiny_shakespeare" / "1.0.0" / "dataset_info.json").is_file()


def test_lm1b_prepared_by_two_at_once(folder: Path) -> None:
    top = "1-billion-word-language-modeling-benchmark-r13output"
    files = {
        "training-monolingual.tokenized.shuffled/news.en-00001-of-00100": 17,
        "training-monolingual.tokenized.shuffled/news.en-00002-of-00100": 23,
        "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050": 8,
    }
    stored: dict[str, dict[str, str]] = {"train": {}, "test": {}}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path, count in files.items():
            name = path.rpartition("/")[2]
            lines = [f"Sentence {number} of {name} , with é and “ quotes ” ." for number in range(count)]
            stored["test" if "heldout" in name else "train"] |= {f"{name}_{i}": line for i, line in enumerate(lines)}
            data = "".join(f"{line}\n" for line in lines).encode()
            member = tarfile.TarInfo(f"{top}/{path}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    url = f"http://www.statmt.org/lm-benchmark/{top}.tar.gz"
    _downloaded(folder, "lm1b", url, packed.getvalue())

    train, test = (_stored(split, examples) for split, examples in stored.items())
    with ThreadPoolExecutor(2) as pool:
        whole, parts = pool.map(_texts, ["tfds:lm1b:train:text", "tfds:lm1b:1.1.0:train[25%:75%]+test"])
    assert whole == train
    assert parts == train[10:30] + test


def test_prepared_by_another_process_just_after_the_builder_was_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "ROMEO:\nIn short.\n" * 30
    _downloaded(folder, "tiny_shakespeare", SHAKESPEARE, text.encode())
    made: list[tfds.core.DatasetBuilder] = []

    def make_and_let_another_prepare(*_: object) -> tfds.core.DatasetBuilder:
        made.append(tfds.builder("tiny_shakespeare", data_dir=folder))
        if len(made) == 1:
            tfds.builder("tiny_shakespeare", data_dir=folder).download_and_prepare()
            assert made[0].is_prepared() and not made[0].info.splits
        return made[-1]

    monkeypatch.setattr(datasets, "_builder", make_and_let_another_prepare)
    address = "tiny_shakespeare:train"
    found = list(datasets._read(datasets.parse(address, "data.source"), "data.source", address))
    assert b"".join(found).decode() == text[: int(len(text) * 0.9)]
    assert len(made) == 2


ARTICLES = [(f"Title {number}", f"Article {number} à propos.\n\nSecond paragraph.") for number in range(20)]


@pytest.mark.slow
def test_wikipedia_that_is_prepared(folder: Path) -> None:
    class Prepared(Wikipedia, skip_registration=True):  # the real one's name, versions, configurations and features
        name = "wikipedia"

        def _split_generators(self, _: object) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
            return {"train": ((number, {"title": t, "text": x}) for number, (t, x) in enumerate(ARTICLES))}

    builder = Prepared(config="20230601.en", data_dir=folder)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    prepared = folder / "wikipedia" / "20230601.en" / "1.0.0"
    assert len(list(prepared.glob("wikipedia-train.tfrecord-*-of-00004"))) == 4

    titles = _stored("train", {str(number): title for number, (title, _) in enumerate(ARTICLES)})
    texts = [dict(ARTICLES)[title] for title in titles]
    with ThreadPoolExecutor(2) as pool:
        half, rest = pool.map(
            _texts, ["tfds:wikipedia/20230601.en:train[:50%]:text", "tfds:wikipedia/20230601.en:train[50%:]:title"]
        )
    assert half == texts[:10]
    assert rest == titles[10:]


def _dump(folder: Path) -> None:
    """Puts a dump of the Abkhaz Wikipedia where the builder looks: 20 articles, a redirect and a page of talk."""
    url = "https://mirror.accum.se/mirror/wikimedia.org/dumps/abwiki/20230601/"
    dump = "abwiki-20230601-pages-articles-multistream.xml.bz2"
    pages = [(0, title, f"'''{text}'''<ref>gone</ref> [[Moon|the moon]]") for title, text in ARTICLES]
    pages += [(0, "Moved", "#REDIRECT [[Title 1]]"), (1, "Talk:Title 1", "not an article")]
    xml = "".join(
        f"<page><title>{title}</title><ns>{space}</ns><id>{number}</id><revision><id>{number}</id>"
        f"<timestamp>2023-06-01T00:00:00Z</timestamp><model>wikitext</model><format>text/x-wiki</format>"
        f'<text xml:space="preserve">{escape(text)}</text></revision></page>'
        for number, (space, title, text) in enumerate(pages)
    )
    site = "<siteinfo><sitename>Wikipedia</sitename><dbname>abwiki</dbname><namespaces></namespaces></siteinfo>"
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10">{site}{xml}</mediawiki>'
    packed = bz2.compress(xml.encode())
    status = {"jobs": {"articlesmultistreamdump": {"status": "done", "files": {dump: {"size": len(packed)}}}}}
    _downloaded(folder, "wikipedia", f"{url}dumpstatus.json", json.dumps(status).encode())
    _downloaded(folder, "wikipedia", f"{url}{dump}", packed)


@pytest.mark.skipif(not MISSING, reason="all packages of wikipedia's builder are installed")
def test_a_package_that_is_missing_is_named(folder: Path) -> None:
    _dump(folder)
    with pytest.raises(ConfigError, match=rf"needs a package that is not installed: pip install {MISSING[0]}, or "):
        _texts("tfds:wikipedia/20230601.ab")


@pytest.mark.skipif(bool(MISSING), reason="not all packages of wikipedia's builder are installed")
def test_wikipedia_from_its_dump(folder: Path) -> None:
    _dump(folder)
    cleaned = {str(number): f"{text} the moon" for number, (_, text) in enumerate(ARTICLES)}
    assert _texts("tfds:wikipedia/20230601.ab:train:text") == _stored("train", cleaned)

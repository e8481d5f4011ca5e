"""Text and records from TensorFlow Datasets: `tfds:NAME[/CONFIG][:SPLIT][:FIELD]`.

NAME is a data set that TensorFlow Datasets knows (wikipedia/20230601.en, lm1b, tiny_shakespeare), with a version if one
is wanted (lm1b:1.1.0), or the folder of a prepared one. SPLIT is train by default, and may be a slice: train[:90%].
FIELD is the feature that holds the text: by default `text`, or the only feature that is text. Records have features of
any kind that JSON has too (`features.py`).

A separate process reads the data set and sends texts, or records as JSON, through a pipe: reading starts TensorFlow,
and in the process that trains nothing may start it before a `MultiWorkerMirroredStrategy` is made.
"""

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tfdp.data import inputs, records
from tfdp.system import messages
from tfdp.system.exits import ConfigError

_TEXT, _MISTAKE = b"T", b"M"  # the kinds of frames: a text, or the line to end with
_FORM = "tfds:NAME[/CONFIG][:SPLIT][:FIELD]"


@dataclass(frozen=True)
class Address:
    """The parts of what stands after `tfds:`."""

    name: str  # with config and version, or a folder
    split: str
    field: str | None


def parse(address: str, key: str) -> Address:
    """Splits an address at the colons that stand in no bracket. Raises `ConfigError` for too many or too few parts."""
    name, *rest = re.split(r":(?![^\[]*\])", address)
    if rest and re.fullmatch(r"\d+\.\d+\.\d+", rest[0]):
        name = f"{name}:{rest.pop(0)}"
    if not name or len(rest) > 2:
        raise ConfigError(f"{_named(address, key)} must be {_FORM}, such as tfds:lm1b:train[:90%]:text")
    split, field = [*rest, "", ""][:2]
    return Address(name, split or "train", field or None)


def _named(address: str, key: str) -> str:
    return f"{key} ({messages.shown(f'tfds:{address}')})"


def examples(address: str, key: str) -> Iterator[tuple[int, str]]:
    """Yields (number from 0, text) of a split, in its fixed order.

    Raises:
      ConfigError: no such data set, split or field, text that is not UTF-8, or no network to download it with.
    """
    parse(address, key)
    yield from enumerate(_received(address, key, []))


def dataset_records(address: str, fields: Sequence[str], key: str) -> Iterator[records.Record]:
    """Yields the records of a split, in its fixed order, numbered from 0.

    Args:
      address: without a field.
      fields: whose values are wanted; a.b is the feature a.b, else the feature b of the features a.
      key: the configuration key to blame.

    Raises:
      ConfigError: as `examples` does, or a feature that is not there, or a value that is missing.
    """
    parse(address, key)
    for number, text in enumerate(_received(address, key, [json.dumps(list(fields))])):
        yield records.Record(number, json.loads(text), f"{_named(address, key)}, example {number}, field")


def _received(address: str, key: str, fields: Sequence[str]) -> Iterator[str]:
    """What the reading process sends: texts, or with `fields`, a list of names in JSON, lists of their values."""
    command = [sys.executable, "-m", "tfdp.data.datasets", address, key, *fields]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("TF_CONFIG", None)
    with (
        tempfile.TemporaryFile() as printed,  # an unread pipe would fill up and block the process
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=printed, env=environment) as process,
    ):
        try:
            assert process.stdout is not None
            for kind, text in _frames(process.stdout):
                if kind == _MISTAKE:
                    raise ConfigError(text)
                yield text
            if process.wait() != 0:
                printed.seek(0)
                last = printed.read().decode(errors="replace").strip().splitlines()[-1:]
                raise ConfigError(f"{_named(address, key)} could not be read: {' '.join(last) or process.returncode}")
        finally:
            process.kill()


def _frames(stream: IO[bytes]) -> Iterator[tuple[bytes, str]]:
    while header := stream.read(9):
        length = int.from_bytes(header[1:], "little")
        yield header[:1], stream.read(length).decode("utf-8")


# ---------------------------------------------------------------------------------------------------
# The reading process
# ---------------------------------------------------------------------------------------------------


def main() -> int:
    """Reads the data set that the arguments name, and writes a frame for each text or record."""
    address, key, *rest = sys.argv[1:]
    fields = json.loads(rest[0]) if rest else None
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the libraries print must not mix with the frames

    def write(kind: bytes, data: bytes) -> None:
        output.write(kind + len(data).to_bytes(8, "little") + data)

    try:
        for number, data in enumerate(_read(parse(address, key), key, address, fields)):
            try:
                data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{_named(address, key)}, example {number}, must be UTF-8: {error.reason} at byte {error.start}"
                ) from None
            write(_TEXT, data)
    except ConfigError as error:
        write(_MISTAKE, str(error).encode())
    output.flush()
    return 0


def _read(wanted: Address, key: str, address: str, fields: Sequence[str] | None = None) -> Iterator[bytes]:
    """The texts of a data set, or where `fields` are named, lists of their values in JSON."""
    from tfdp.system.startup import load_tensorflow

    load_tensorflow()
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    shown = _named(address, key)
    builder = _builder(tfds, wanted, shown)
    # A builder that was made before another process prepared the data never learns of its splits.
    if not (builder.is_prepared() and builder.info.splits):
        _prepare(builder, shown)
        builder = _builder(tfds, wanted, shown)
    if fields is None:
        field = _field(tfds, builder, wanted.field, shown)
        yield from (example[field] for example in _opened(tfds, builder, wanted.split, shown))
        return
    from tfdp.data.features import Field

    features = _features(builder)
    found = [Field(name, features, shown) for name in fields]
    is_flat = type(builder.info.features) is tfds.features.FeaturesDict  # of no other kind a part can be decoded
    needed = tfds.decode.PartialDecoding({field.place[0]: True for field in found}) if is_flat else None
    for number, example in enumerate(_opened(tfds, builder, wanted.split, shown, needed)):
        yield json.dumps([field.value(example, f"{shown}, example {number},") for field in found]).encode()


def _opened(tfds: Any, builder: Any, split: str, shown: str, decoders: Any = None) -> Any:
    """The examples of a split in their fixed order. Raises `ConfigError` where there is no such split."""
    config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    try:
        data = builder.as_dataset(split=split, shuffle_files=False, read_config=config, decoders=decoders)
    except (ValueError, KeyError, AssertionError) as error:
        listed = ", ".join(builder.info.splits)
        reason = " ".join(str(error).split())
        raise ConfigError(f"{shown} must name a split of {listed}, or a slice of one: {reason[:200]}") from None
    return tfds.as_numpy(data)


def _builder(tfds: Any, wanted: Address, shown: str) -> Any:
    try:
        if os.path.isdir(folder := inputs.path_of(wanted.name)):
            return tfds.builder_from_directory(folder)
        return tfds.builder(wanted.name)
    except tfds.core.registered.DatasetNotFoundError as error:
        near = re.search(r"Did you mean: (.*?)\s*(?:\n|$)", str(error))
        hint = f"did you mean {near.group(1)}?" if near else "name one of tfds.list_builders(), or a prepared folder"
        raise ConfigError(f"{shown} must be a data set of TensorFlow Datasets: {hint}") from None
    except Exception as error:  # each data set has errors of its own
        raise ConfigError(
            f"{shown} could not be opened: {messages.one_line(' '.join(str(error).split()))[:200]}"
        ) from None


def _prepare(builder: Any, shown: str) -> None:
    """Downloads and prepares a data set once, however many processes ask for it; fails at once without a network."""
    from tensorflow_datasets.core.download import downloader

    downloader.MAX_RETRIES = 0  # else it tries for three minutes
    folder = Path(builder.data_dir)
    lock = folder.parents[1] / f".{folder.parent.name}.tfdp-lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not builder.is_prepared():
                builder.download_and_prepare()
    except ImportError as error:
        package = _missing_package(error)
        raise ConfigError(
            f"{shown} is not prepared in {folder}, and preparing it needs a package that is not installed: "
            f"pip install {package}, or prepare it where {package} is, with "
            "tfds.builder(...).download_and_prepare(), and copy the folder"
        ) from None
    except Exception as error:  # a data set's own, its downloads', or the disk's
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{shown} is not prepared in {folder}, and could not be downloaded ({type(error).__name__}: {reason}); "
            f"prepare it where there is a network, with tfds.builder(...).download_and_prepare(), and copy the folder"
        ) from None


def _missing_package(error: BaseException) -> str:
    """The package that an import did not find: TensorFlow Datasets wraps the error that knows its name."""
    while getattr(error, "name", None) is None and (error.__cause__ or error.__context__) is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return getattr(error, "name", None) or " ".join(str(error).split())[:200]


def _features(builder: Any) -> dict[str, Any]:
    """The features of a data set by name."""
    return dict(builder.info.features) if hasattr(builder.info.features, "items") else {}


def _field(tfds: Any, builder: Any, field: str | None, shown: str) -> str:
    """The feature that holds the text."""
    texts = [name for name, feature in _features(builder).items() if isinstance(feature, tfds.features.Text)]
    if field is None:
        field = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if field is None or field not in texts:
        listed = ", ".join(texts) or "none"
        raise ConfigError(f"{shown} must name a feature that is text, of {listed}: tfds:NAME:SPLIT:FIELD")
    return field


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())

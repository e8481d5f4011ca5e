"""Compressed files: all of their streams are read, and damage is never taken for their end."""

import bz2
import gzip
import itertools
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tfdp.data import compression
from tfdp.data.corpus import documents
from tfdp.system.exits import ConfigError


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstd,
}
SKIPPABLE = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"


def texts(path: Path) -> list[str]:
    return [document.text for document in documents(f"jsonl:{path}")]


def json_of(some: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in some)


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        texts(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["gz", "GZ", "xz", "XZ", "bz2", "Bz2", "zst", "zstd", "ZST"])
def test_a_suffix_names_the_compression_in_any_case(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix.lower().replace("zstd", "zst")]
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(compress(json_of(["first", "é"])))
    (tmp_path / f"a.txt.{suffix}").write_bytes(compress("é\r\n".encode()))
    assert texts(tmp_path / f"a.jsonl.{suffix}") == ["first", "é"]
    assert [document.text for document in documents(f"text:{tmp_path}/*.txt.*")] == ["é\r\n"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_all_streams_are_read_also_where_a_line_or_a_chunk_crosses_them(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [str(number**5) for number in range(30)]
    data = json_of(some)
    cuts = [0, 100, 101, 101, 700, len(data)]
    streams = [COMPRESS[suffix](data[start:end]) for start, end in itertools.pairwise(cuts)]
    (tmp_path / f"a.{suffix}").write_bytes(b"".join(streams))
    assert texts(tmp_path / f"a.{suffix}") == some
    for size in (1, 2, 7):
        monkeypatch.setattr(compression, "_COMPRESSED_CHUNK", size)
        assert texts(tmp_path / f"a.{suffix}") == some


@pytest.mark.parametrize(
    ("suffix", "padding"),
    [("gz", b"\0"), ("gz", b"\0" * 511), ("xz", b"\0" * 4), ("xz", b"\0" * 1024), ("zst", SKIPPABLE)],
)
@pytest.mark.parametrize("chunk", [3, 1 << 16])
def test_the_padding_of_a_format_ends_no_file(
    tmp_path: Path, suffix: str, padding: bytes, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "_COMPRESSED_CHUNK", chunk)
    first, second = COMPRESS[suffix](json_of(["1"])), COMPRESS[suffix](json_of(["2"]))
    (tmp_path / f"a.{suffix}").write_bytes(first + padding + second + padding)
    assert texts(tmp_path / f"a.{suffix}") == ["1", "2"]


@pytest.mark.parametrize(
    ("suffix", "tail"),
    [
        *((suffix, tail) for suffix in COMPRESS for tail in (b"x", b"garbage " * 4, b'{"text": "3"}\n', b"\0x")),
        *(("xz", b"\0" * number) for number in (1, 2, 3, 5, 1023)),
        ("bz2", b"\0"),
        ("zst", b"\0"),
        ("zst", SKIPPABLE[:-1]),
    ],
)
def test_what_follows_a_stream_and_is_none_is_refused(tmp_path: Path, suffix: str, tail: bytes) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(COMPRESS[suffix](json_of(["1"])) + tail)
    assert f"{path} must be whole and readable, but after line" in refusal(path)
    path.write_bytes(COMPRESS[suffix](json_of(["1"])) + tail + COMPRESS[suffix](json_of(["2"])))
    assert f"{path} must be whole and readable, but after line" in refusal(path)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["flip", "cut", "append", "zero"])
def test_two_hundred_damages_are_refused_or_change_nothing(tmp_path: Path, suffix: str, damage: str) -> None:
    """Harmless are fields of a gzip header that say nothing of the content, zeros after it, and unused last bits."""
    some = [str(number**9) for number in range(100)]
    whole = COMPRESS[suffix](json_of(some))
    rng = random.Random(f"{suffix} {damage}")
    path = tmp_path / f"a.{suffix}"
    num_refused = 0
    for _ in range(200):
        data = bytearray(whole)
        if damage == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif damage == "cut":
            del data[rng.randrange(len(data)) :]
        elif damage == "append":
            data += rng.randbytes(rng.randint(1, 40))
        else:
            start = rng.randrange(len(data))
            data[start:] = bytes(len(data) - start)
        path.write_bytes(data)
        try:
            assert texts(path) == some
        except ConfigError as error:
            assert "\n" not in str(error)
            num_refused += 1
    assert num_refused >= {"flip": 185, "cut": 200, "append": 200, "zero": 195}[damage]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_without_a_stream_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"")
    assert refusal(path).endswith(
        "must be whole and readable, but after line 0: it is no whole "
        + {
            "gz": "gzip file: it is empty",
            "xz": "xz file: it is empty",
            "bz2": "bzip2 file: it is empty",
            "zst": "Zstandard file: it is empty",
        }[suffix]
    )
    path.write_bytes(COMPRESS[suffix](b""))
    assert texts(path) == []


@pytest.mark.parametrize("window_log", [28, 31])
def test_zstandard_with_a_long_window(tmp_path: Path, window_log: int) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    encoder = compressor.compressobj()
    data = encoder.compress(json_of(["long"])) + encoder.flush()
    assert zstandard.get_frame_parameters(data).window_size == 1 << window_log
    (tmp_path / "a.zst").write_bytes(data)
    assert texts(tmp_path / "a.zst") == ["long"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "it is gzip: give its name the suffix .gz"),
        ("a.jsonl", lzma.compress(b"{}"), "it is xz: give its name the suffix .xz"),
        ("a.jsonl", bz2.compress(b"{}"), "it is bzip2: give its name the suffix .bz2"),
        ("a.jsonl", zstd(b"{}"), "it is Zstandard: give its name the suffix .zst"),
        ("a.jsonl", b"PK\x03\x04" + bytes(30), "it is zip: unpack it first"),
        ("a.jsonl.lz4", b"\x04\x22\x4d\x18" + bytes(30), "it is LZ4: unpack it first"),
        ("a.jsonl", b"PAR1\x15" + bytes(30), "it is Parquet: name it as parquet:PATH"),
        ("a.jsonl.gz", zstd(b"{}"), "it is Zstandard: give its name the suffix .zst"),
        ("a.jsonl.gz", gzip.compress(lzma.compress(b"{}"), mtime=0), "it is xz: give its name the suffix .xz"),
        ("a.tar.gz", gzip.compress(bytes(257) + b"ustar\x0000" + bytes(900), mtime=0), "it is tar: unpack it first"),
    ],
)
def test_content_of_another_kind_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    for kind in ("jsonl", "text"):
        with pytest.raises(ConfigError, match=rf"^data.source: {tmp_path}/{name} must be .*readable.*: {message}$"):
            list(documents(f"{kind}:{tmp_path}/{name}"))

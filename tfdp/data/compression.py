"""The content of a file that may be compressed, as its suffix says: .gz, .xz, .bz2, .zst or .zstd, in any case.

A file may hold several streams, one after the other, and the padding that its format allows: zeros after a gzip stream,
multiples of four zeros after an xz stream, skippable frames of Zstandard. Anything else after a stream is damage.
Damage inside a stream is found by the checksums that the format has; Zstandard writes one only if it is told to.
"""

import bz2
import errno
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tfdp.data import inputs

_SUFFIXES = {".gz": "gzip", ".xz": "xz", ".bz2": "bzip2", ".zst": "Zstandard", ".zstd": "Zstandard"}
_PADDING = {"gzip": 1, "xz": 4}  # bytes, of which there may be a multiple after a stream
_CHUNK = 1 << 20
_COMPRESSED_CHUNK = 1 << 14  # expands to a few hundred MB at most (zeros), text to some 100 kB
_LARGEST_WINDOW = 1 << 31  # bytes, of Zstandard: what `zstd --long=31` asks for; memory is taken as a frame says
_BEGINNINGS = [  # what files of these kinds begin with, at an offset
    ("gzip", 0, b"\x1f\x8b\x08"),
    ("xz", 0, b"\xfd7zXZ\0"),
    ("bzip2", 4, b"1AY&SY"),
    ("Zstandard", 0, b"\x28\xb5\x2f\xfd"),
    ("LZ4", 0, b"\x04\x22\x4d\x18"),
    ("compress", 0, b"\x1f\x9d"),
    ("zip", 0, b"PK\x03\x04"),
    ("7-Zip", 0, b"7z\xbc\xaf\x27\x1c"),
    ("RAR", 0, b"Rar!\x1a\x07"),
    ("tar", 257, b"ustar\0"),
    ("tar", 257, b"ustar  \0"),
    ("Parquet", 0, b"PAR1\x15"),
]


class DamagedError(OSError):
    """A file is not of the kind that its suffix says, or not whole."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EIO, message)


def chunks(path: Path) -> Iterator[bytes]:
    """Yields the decompressed content of a regular file, some of it at a time. Raises `OSError`."""
    inputs.require_regular(path)
    kind = _SUFFIXES.get(path.suffix.lower())
    with path.open("rb") as file:
        _refuse_other(file.peek(512), kind)
        if kind is None:
            yield from iter(lambda: file.read(_CHUNK), b"")
            return
        is_first = True
        for chunk in _decompressed(file, kind):
            if chunk and is_first:
                _refuse_other(chunk, None)
            is_first = is_first and not chunk
            yield chunk


def lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a file, without their line feeds. Raises `OSError`."""
    pending: list[bytes] = []
    for chunk in chunks(path):
        first, *others = chunk.split(b"\n")
        pending.append(first)
        for line in others:
            yield b"".join(pending)
            pending = [line]
    if last := b"".join(pending):
        yield last


def _decompressed(file: IO[bytes], kind: str) -> Iterator[bytes]:
    make, error = _codec(kind)
    try:
        yield from _streams(file, make, _PADDING.get(kind, 0))
    except (error, EOFError) as damage:
        raise DamagedError(f"it is no whole {kind} file: {' '.join(str(damage).split())}") from None


def _streams(file: IO[bytes], make_decoder: Callable[[], Any], padding: int) -> Iterator[bytes]:
    """The content of all streams of a file. Raises `EOFError`, and what the decoders raise."""
    decoder, num_zeros = None, 0
    while data := file.read(_COMPRESSED_CHUNK):
        while data:
            if decoder is None or decoder.eof:
                stream = data.lstrip(b"\0") if decoder is not None and padding else data
                num_zeros += len(data) - len(stream)
                if not (data := stream):
                    break
                _check_padding(num_zeros, padding)
                decoder, num_zeros = make_decoder(), 0
            yield decoder.decompress(data)
            data = decoder.unused_data if decoder.eof else b""
    if decoder is None:
        raise EOFError("it is empty")
    if not decoder.eof:
        raise EOFError("it was cut off")
    _check_padding(num_zeros, padding)


def _check_padding(num_zeros: int, padding: int) -> None:
    if padding and num_zeros % padding:
        raise EOFError(f"{num_zeros} zeros follow a stream, which must be a multiple of {padding}")


def _codec(kind: str) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes a decoder of one stream, and the error of its library."""
    if kind == "gzip":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    if kind == "xz":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), lzma.LZMAError
    if kind == "bzip2":
        return bz2.BZ2Decompressor, OSError
    import zstandard

    return lambda: zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj(), zstandard.ZstdError


def _refuse_other(beginning: bytes, kind: str | None) -> None:
    """Raises `DamagedError` if a file that should be of a kind, or plain, begins as one of another kind does."""
    found = next((name for name, offset, magic in _BEGINNINGS if beginning.startswith(magic, offset)), kind)
    if found == kind:
        return
    suffixes = [suffix for suffix, name in _SUFFIXES.items() if name == found]
    fix = f"give its name the suffix {suffixes[0]}" if suffixes else "unpack it first"
    raise DamagedError(f"it is {found}: {'name it as parquet:PATH' if found == 'Parquet' else fix}")

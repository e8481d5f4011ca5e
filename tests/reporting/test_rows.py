"""Rows of metrics.jsonl: each is read as it was written, or not at all."""

import json
import random
import resource
from pathlib import Path

import pytest

from tfdp.reporting.rows import RowWriter, drop_rows_after, from_json, read_rows, to_json
from tfdp.system.exits import TrainingError

ROWS = [{"step": step, "loss": 1 / step, "name": "é", "none": None} for step in range(1, 41)]


def write(path: Path) -> None:
    writer = RowWriter(path)
    for row in ROWS:
        writer.write(row)
    writer.close()


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "rows")
    assert read_rows(tmp_path / "rows") == (ROWS, [])
    assert read_rows(tmp_path / "none") == ([], [])
    for line, row in zip((tmp_path / "rows").read_text().splitlines(), ROWS, strict=True):
        assert json.loads(line).items() > row.items()
    for indent in (None, 1):
        assert from_json(to_json(ROWS[0], indent).encode()) == ROWS[0]


def test_each_flipped_bit_of_rows_is_found_or_changes_none(tmp_path: Path) -> None:
    path, generator = tmp_path / "rows", random.Random(0)
    write(path)
    whole = path.read_bytes()
    for _ in range(200):
        data, bit = bytearray(whole), generator.randrange(8 * len(whole))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        rows, damaged = read_rows(path)
        if damaged:
            assert all(row in ROWS for row in rows) and len(ROWS) - len(rows) in (1, 2), bit
        else:  # the name of the checksum was hit, and nothing else
            assert [{key: row[key] for key in ROWS[0]} for row in rows] == ROWS, bit


def test_rows_of_earlier_versions_are_read_and_a_torn_one_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 41, "lo')
    drop_rows_after(path, 30)
    assert read_rows(path) == (ROWS[:30], [])
    assert capsys.readouterr().err == f"warning: line 41 of {path} is not as it was written: it is skipped\n"


def test_what_nobody_drops_is_not_written_again(tmp_path: Path) -> None:
    write(tmp_path / "rows")
    before = (tmp_path / "rows").stat()
    drop_rows_after(tmp_path / "rows", 40)
    assert (tmp_path / "rows").stat().st_ino == before.st_ino


def test_rows_wait_while_the_disk_is_full_and_none_is_torn_or_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows"
    writer = RowWriter(path)
    writer.write(ROWS[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        for row in ROWS[1:5]:
            writer.write(row)
        assert read_rows(path) == (ROWS[:1], [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for row in ROWS[5:]:
        writer.write(row)
    writer.close()
    assert read_rows(path) == (ROWS, [])
    assert capsys.readouterr().err == f"warning: {path} cannot be written (File too large): its rows wait\n"


def test_rows_that_were_never_written_are_told_of_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = RowWriter(tmp_path / "gone" / "rows")
    writer.write(ROWS[0])
    writer.write(ROWS[1])
    writer.close()
    first, last = capsys.readouterr().err.splitlines()
    assert first == f"warning: {tmp_path}/gone/rows cannot be written (No such file or directory): its rows wait"
    assert last == f"warning: {tmp_path}/gone/rows lacks the last 2 rows"


def test_a_full_disk_while_rows_are_dropped_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "rows")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(TrainingError, match=r"rows cannot be written: File too large$"):
            drop_rows_after(tmp_path / "rows", 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_rows(tmp_path / "rows") == (ROWS, [])

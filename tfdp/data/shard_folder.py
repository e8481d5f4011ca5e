"""The folder in which shards are made: which of its entries are our own. Only those are ever removed.

`recipe.json` marks a folder that is being prepared: it is written first, and removed last when the shards are done.
"""

import glob
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tfdp.data.encoding import PARTS_FOLDER
from tfdp.data.inputs import literal_start
from tfdp.data.manifest import MANIFEST_FILE, SPLITS, TOKENIZER_FOLDER
from tfdp.data.tokenizers.bpe import MERGES_FILE, VOCABULARY_FILE
from tfdp.data.tokenizers.hugging_face import KEPT_FILES
from tfdp.data.tokenizers.sentence_piece import MODEL_FILE
from tfdp.data.tokenizers.tokenizer import KIND_FILE
from tfdp.data.verification import VERIFIED_FILE

RECIPE_FILE, LOCK_FILE = "recipe.json", ".lock"

_SCRATCH = r"\.{}\.\d+\.tmp"  # of `files.replacing`
_RECIPE_SCRATCH = _SCRATCH.format(re.escape(RECIPE_FILE))
_PART = r"\d{7}\.(tokens|index|json)"
_OF_TOKENIZER = "|".join(map(re.escape, (KIND_FILE, VOCABULARY_FILE, MERGES_FILE, MODEL_FILE, *KEPT_FILES)))
_SHARDS = rf"({'|'.join(SPLITS)})(-\d{{5,}}\.bin|\.documents\.npy|\.documents\.jsonl)"
_FILES = "|".join(
    [_SHARDS, re.escape(LOCK_FILE), r"\.nfs[0-9a-f]+"]  # the last: what NFS keeps of an open file that was removed
    + [rf"{re.escape(name)}|{_SCRATCH.format(re.escape(name))}" for name in (MANIFEST_FILE, RECIPE_FILE, VERIFIED_FILE)]
)
_FOLDERS = {
    PARTS_FOLDER: rf"{_PART}|{_SCRATCH.format(_PART)}",
    TOKENIZER_FOLDER: _OF_TOKENIZER,
    rf"{TOKENIZER_FOLDER}\.tmp-\d+-[0-9a-f]{{8}}": _OF_TOKENIZER,
}


def foreign_entries(folder: Path) -> list[str]:
    """The entries of a folder that no preparation has written, by path below the folder; sorted.

    A name alone proves nothing: without a sign that shards are or were being made there, everything is foreign, except
    the lock and an unfinished mark: another process may just be starting there, or have died.
    """
    found = sorted(_entries(folder))
    if not _is_marked(folder):
        return [name for name, _ in found if name != LOCK_FILE and not re.fullmatch(_RECIPE_SCRATCH, name)]
    return [name for name, is_own in found if not is_own]


def remove_shards(folder: Path) -> None:
    """Removes the files of a finished preparation, the manifest first: without it the rest are no shards."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    (folder / VERIFIED_FILE).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if re.fullmatch(_SHARDS, path.name):
            path.unlink()


def remove_tokenizer(folder: Path) -> None:
    for path in list(folder.glob(f"{TOKENIZER_FOLDER}*")):
        _remove_folder(path)


def remove_scaffold(folder: Path) -> None:
    """Removes the parts, then the mark of an unfinished preparation."""
    _remove_folder(folder / PARTS_FOLDER)
    for path in list(folder.iterdir()):
        if re.fullmatch(_RECIPE_SCRATCH, path.name):  # of a process that died
            path.unlink(missing_ok=True)
    (folder / RECIPE_FILE).unlink(missing_ok=True)


def own_file_read_by(pattern: str, folder: Path) -> str | None:
    """A file that a preparation in `folder` will write and that a glob pattern matches; None if there is none.

    The files need not be there: the pattern is tried on a tree of empty ones.
    """
    names = [MANIFEST_FILE, RECIPE_FILE, VERIFIED_FILE]
    names += [f"{split}{end}" for split in SPLITS for end in ("-00000.bin", ".documents.npy", ".documents.jsonl")]
    names += [f"{PARTS_FOLDER}/0000000.{end}" for end in ("tokens", "index", "json")]
    names += [
        f"{TOKENIZER_FOLDER}/{name}" for name in (KIND_FILE, VOCABULARY_FILE, MERGES_FILE, MODEL_FILE, *KEPT_FILES)
    ]
    pattern = os.path.abspath(os.path.expanduser(pattern))
    pattern = literal_start(pattern) + ("/**" if os.path.isdir(pattern) else "")
    with tempfile.TemporaryDirectory() as root:
        for place in {os.path.abspath(folder), os.path.realpath(folder)}:
            for name in names:
                path = Path(f"{root}{place}", name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        found = glob.glob(pattern.lstrip("/"), root_dir=root, recursive=True)
        files = sorted(path for path in found if Path(root, path).is_file())
    return f"/{files[0]}" if files else None


def _entries(folder: Path) -> Iterator[tuple[str, bool]]:
    """Paths below the folder, and whether each has the name and kind of one of our own; a link is never ours."""
    for entry in os.scandir(folder):
        inside = next((pattern for name, pattern in _FOLDERS.items() if re.fullmatch(name, entry.name)), None)
        if inside is None or not entry.is_dir(follow_symlinks=False):
            yield entry.name, entry.is_file(follow_symlinks=False) and bool(re.fullmatch(_FILES, entry.name))
            continue
        for each in _scan(entry):
            is_own = each.is_file(follow_symlinks=False) and bool(re.fullmatch(inside, each.name))
            yield f"{entry.name}/{each.name}", is_own


def _scan(folder: os.DirEntry[str]) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except FileNotFoundError:  # another process has just finished there
        return []


def _is_marked(folder: Path) -> bool:
    """Whether shards are or were being made here: by what no other program writes."""
    if "cleaning" in _keys(folder / RECIPE_FILE) or {"splits", "recipe"} <= _keys(folder / MANIFEST_FILE):
        return True
    names = folder / f"{SPLITS[0]}.documents.jsonl"  # the manifest may be damaged, or gone
    return (folder / TOKENIZER_FOLDER / KIND_FILE).is_file() and names.is_file()


def _keys(path: Path) -> set[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    return set(content) if isinstance(content, dict) else set()


def _remove_folder(folder: Path) -> None:
    """Removes a folder of our own, file by file; other files stay, and then the folder does too."""
    pattern = next((pattern for name, pattern in _FOLDERS.items() if re.fullmatch(name, folder.name)), None)
    if pattern is None or not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if re.fullmatch(pattern, path.name):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()

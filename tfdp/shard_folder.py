"""The folder in which shards are made: only what this program wrote there is ever removed.

`recipe.json` marks a folder in the making: it is the first file there, and the last to go when the shards are done.
"""

import re
from pathlib import Path

from tfdp.bpe import MERGES_FILE, VOCABULARY_FILE
from tfdp.manifest import MANIFEST_FILE, SPLITS, TOKENIZER_FOLDER
from tfdp.parts import PARTS_FOLDER
from tfdp.sentence_piece import MODEL_FILE
from tfdp.tokenizer import KIND_FILE
from tfdp.verification import VERIFIED_FILE

RECIPE_FILE = "recipe.json"

_SCRATCH = r"\.{}\.\d+\.tmp"  # of `files.replacing`
_PART = r"\d{7}\.(tokens|index|json)"
_OF_TOKENIZER = "|".join(map(re.escape, (KIND_FILE, VOCABULARY_FILE, MERGES_FILE, MODEL_FILE)))
_SHARDS = rf"({'|'.join(SPLITS)})(-\d{{5,}}\.bin|\.documents\.npy|\.documents\.jsonl)"
_FOLDERS = {
    PARTS_FOLDER: rf"{_PART}|{_SCRATCH.format(_PART)}",
    TOKENIZER_FOLDER: _OF_TOKENIZER,
    rf"{TOKENIZER_FOLDER}\.tmp-\d+-[0-9a-f]{{8}}": _OF_TOKENIZER,
}


def remove_shards(folder: Path) -> None:
    """Removes what a finished preparation left, the manifest first: without it nothing passes for shards."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    (folder / VERIFIED_FILE).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if re.fullmatch(_SHARDS, path.name):
            path.unlink()


def remove_tokenizer(folder: Path) -> None:
    for path in list(folder.glob(f"{TOKENIZER_FOLDER}*")):
        _remove_folder(path)


def remove_scaffold(folder: Path) -> None:
    """Removes the parts, then the mark of a folder in the making."""
    _remove_folder(folder / PARTS_FOLDER)
    (folder / RECIPE_FILE).unlink(missing_ok=True)


def _remove_folder(folder: Path) -> None:
    """Removes a folder of our own, file by file; what is not ours stays, and so does the folder then."""
    pattern = next((pattern for name, pattern in _FOLDERS.items() if re.fullmatch(name, folder.name)), None)
    if pattern is None or not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if re.fullmatch(pattern, path.name):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()

"""Documents -> token shards: on all cores, resumable where it stopped, safe when started twice at once.

A folder that is being prepared holds `recipe.json`, the tokenizer and `parts/` (`encoding.py`). When all parts are
there they are joined into the shards of `shards.py`; the manifest is written last, then the parts go. A folder that
holds anything else is left alone (`shard_folder.py`).
"""

import hashlib
import json
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tfdp.data import joining
from tfdp.data.cleaning import Cleaner
from tfdp.data.corpus import documents, files_pattern, licence_of
from tfdp.data.encoding import PARTS_FOLDER, Encoding, Part, encode_all, groups
from tfdp.data.examples import unmarked
from tfdp.data.inputs import path_of
from tfdp.data.manifest import (
    EXAMPLE_KEYS,
    EXAMPLES_VERSION,
    FORMAT_VERSION,
    MANIFEST_FILE,
    SPLITS,
    TOKENIZER_FOLDER,
    list_files,
    read_manifest,
    write_manifest,
)
from tfdp.data.overlap import Overlap
from tfdp.data.reading import NoText, Recipe, labelled_documents, require_both, require_text, sample
from tfdp.data.shard_folder import (
    RECIPE_FILE,
    foreign_entries,
    own_file_read_by,
    remove_scaffold,
    remove_shards,
    remove_tokenizer,
)
from tfdp.data.shard_writer import SplitWriter
from tfdp.data.shards import DamagedShards, TokenShards, note, open_shards, open_tokenizer_of
from tfdp.data.tokenizers import bpe
from tfdp.data.tokenizers.tokenizer import Tokenizer, make_tokenizer, open_tokenizer, save_tokenizer, size_to_train
from tfdp.system.exits import ConfigError
from tfdp.system.files import locking, write_whole
from tfdp.system.processes import make_pool

_OVERLAP_TOKENS = 16 << 20  # that one process searches at a time


class Watcher:
    """Follows the progress of a preparation; this one prints only warnings."""

    def say(self, line: str) -> None:
        """A line worth reading."""

    def warn(self, line: str) -> None:
        """A line about damage, or about a long wait."""
        note(line)

    def part(self, part: Part) -> None:
        """A part is done."""

    def wait(self) -> None:
        """Another process prepares this folder: this one waits for its end."""


def prepare(
    recipe: Recipe,
    folder: Path,
    key: str = "output",
    watcher: Watcher | None = None,
    num_processes: int = 1,
    overlap: bool = False,
    facts: dict[str, Any] | None = None,
) -> TokenShards:
    """Makes the shards of a recipe in a folder, or the rest of them, and opens them.

    Args:
      recipe: what to make.
      folder: for them; if another process prepares it, this one waits and takes the result.
      key: the configuration key that names the folder, for errors.
      watcher: follows the progress.
      num_processes: to encode with.
      overlap: whether to measure how much of the validation text occurs in the training text.
      facts: what the folder must have been made from; None: the recipe's own, with the names of the sources.

    Raises:
      ConfigError: a mistake in the source, or a folder that holds something else or cannot be written.
    """
    watcher, facts = watcher or Watcher(), facts or recipe.facts()
    try:
        found = _made(folder, facts, key, watcher)
        if found and _is_finished(folder, overlap):
            watcher.say(f"{folder} is prepared already")
            return found
        if not found:
            _require_room(recipe, folder, key)
        folder.mkdir(parents=True, exist_ok=True)
        with locking(folder / ".lock", lambda _holder: watcher.wait()):
            if not _made(folder, facts, key, watcher, is_remade=True):
                _make(recipe, facts, folder, watcher, num_processes)
            _finish(folder, overlap, num_processes)
    except OSError as error:
        raise ConfigError(f"{key} ({folder}) must be a folder that can be written: {error}") from None
    return open_shards(folder, key, say=watcher.warn)


def _made(
    folder: Path, facts: dict[str, Any], key: str, watcher: Watcher, is_remade: bool = False
) -> TokenShards | None:
    """The shards, if the folder holds them whole. Raises `ConfigError` where it holds, or was to hold, others.

    The watcher is warned of damaged ones that will be made again at once.
    """
    _require_same(folder, facts)
    try:
        return open_shards(folder, key, say=watcher.warn)
    except DamagedShards as error:
        if is_remade and (folder / MANIFEST_FILE).exists():
            watcher.warn(f"{error}: making them again")
        return None


def _is_finished(folder: Path, overlap: bool) -> bool:
    """Whether a folder of whole shards is complete."""
    return not (folder / RECIPE_FILE).exists() and not (overlap and read_manifest(folder)["overlap"] is None)


def _finish(folder: Path, overlap: bool, num_processes: int) -> None:
    """Completes a folder of whole shards."""
    remove_scaffold(folder)
    if not _is_finished(folder, overlap):
        _measure_overlap(folder, num_processes)


def _require_same(folder: Path, facts: dict[str, Any]) -> None:
    """Raises `ConfigError` for a folder that holds, or was to hold, the shards of another recipe."""
    for state, read in (("shards", _recipe_of_manifest), ("an unfinished preparation", _begun_recipe)):
        try:
            found = read(folder)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        changed = [f"{key}: {found.get(key)} -> {facts[key]}" for key in facts if found.get(key) != facts[key]]
        if changed:
            raise ConfigError(
                f"{folder} holds {state} of something else ({'; '.join(changed)}): name another folder, or remove it"
            )


def _recipe_of_manifest(folder: Path) -> dict[str, Any]:
    return dict(read_manifest(folder)["recipe"])


def _begun_recipe(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / RECIPE_FILE).read_text()))


def _require_room(recipe: Recipe, folder: Path, key: str) -> None:
    """Raises `ConfigError` for a folder that holds something else, or lies inside what the recipe reads."""
    if folder.is_dir() and (foreign := foreign_entries(folder)):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ConfigError(
            f"{key} ({folder}) must hold only what a preparation writes, but has {', '.join(foreign[:3])}{more}: "
            f"name a new folder"
        )
    for name, source in (("source", recipe.source), ("validation_source", recipe.validation_source)):
        pattern = files_pattern(source, f"{recipe.section}{name}") if source else None
        if pattern and (read := own_file_read_by(pattern, folder)):
            raise ConfigError(
                f"{key} ({folder}) must lie outside of what {recipe.section}{name} ({source}) reads, or {read} becomes "
                f"text: name a folder elsewhere"
            )
    vocabulary = None if size_to_train(recipe.tokenizer) else recipe.tokenizer.partition(":")[2]
    for name, path in (("tokenizer", vocabulary), ("cleaning.stop_words", recipe.cleaning.stop_words)):
        if path and path_of(path).resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{key} ({folder}) must not be where {name} ({path}) lies: name a new folder")


def _make(recipe: Recipe, facts: dict[str, Any], folder: Path, watcher: Watcher, num_processes: int) -> None:
    """Makes the shards, or the rest of them; leaves nothing behind where there is no text."""
    is_resumed = (folder / RECIPE_FILE).exists()
    write_whole(folder / RECIPE_FILE, json.dumps(facts, indent=1))  # first: it marks the other files as ours
    if not is_resumed and not _has_tokenizer(folder):
        remove_tokenizer(folder)
    had_tokenizer = (folder / TOKENIZER_FOLDER).exists()
    (folder / PARTS_FOLDER).mkdir(exist_ok=True)
    try:
        _make_parts_and_join(recipe, facts, folder, watcher, num_processes)
    except ConfigError as error:
        # With no part done, or no text, the recipe may be wrong: the folder must be free for another one.
        if isinstance(error, NoText) or not any((folder / PARTS_FOLDER).glob("*.json")):
            if not had_tokenizer:
                remove_tokenizer(folder)
            remove_scaffold(folder)
        raise


def _has_tokenizer(folder: Path) -> bool:
    """Whether the tokenizer of damaged shards is whole."""
    try:
        return bool(open_tokenizer_of(folder, "output"))
    except ConfigError:
        return False


def _make_parts_and_join(
    recipe: Recipe, facts: dict[str, Any], folder: Path, watcher: Watcher, num_processes: int
) -> None:
    tokenizer = _tokenizer(recipe, folder, watcher)
    has_marks = recipe.form is not None
    is_small = tokenizer.vocab_size <= 1 << 16 and not has_marks
    dtype = np.dtype(np.uint16 if is_small else np.uint32).newbyteorder("<").str
    digest = hashlib.sha256()
    encoding = Encoding(folder / PARTS_FOLDER, folder / TOKENIZER_FOLDER, recipe.cleaning, dtype, has_marks)
    labelled = labelled_documents(recipe, digest)
    parts = encode_all(groups(labelled), encoding, num_processes, watcher.part)
    index = joining.joined_index(parts, recipe.cleaning.duplicates)
    require_text(recipe, index, joining.labels_of(parts))
    choice = joining.choose_splits(parts, index, recipe.validation_fraction, tokenizer, dtype, not has_marks)
    require_both(recipe, index, choice)
    remove_shards(folder)  # damaged ones: only now that their source has been read
    splits = {
        name: joining.join(parts, index, choice, number, SplitWriter(folder, name, dtype, tokenizer.end_of_text))
        for number, name in enumerate(SPLITS)
    }
    found = {"corpus_sha256": digest.hexdigest(), "num_documents_read": len(index)}
    found["left_out"] = joining.count_left_out(index)
    write_manifest(folder, _manifest(recipe, facts, folder, tokenizer, dtype, {**found, "splits": splits}))


def _manifest(
    recipe: Recipe, facts: dict[str, Any], folder: Path, tokenizer: Tokenizer, dtype: str, found: dict[str, Any]
) -> dict[str, Any]:
    tokenizer_files = sorted(f"{TOKENIZER_FOLDER}/{path.name}" for path in (folder / TOKENIZER_FOLDER).iterdir())
    return {
        "version": FORMAT_VERSION if recipe.form is None else EXAMPLES_VERSION,
        **{key: value for key, value in recipe.facts().items() if key != "tokenizer"},
        "licence": recipe.licence or licence_of(recipe.source),
        "tokenizer": tokenizer.fingerprint,
        "tokenizer_files": list_files(folder, tokenizer_files),
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        **found,
        "overlap": None,
        "recipe": facts,
        **({} if recipe.example_keys is None else {EXAMPLE_KEYS: asdict(recipe.example_keys)}),
    }


def _tokenizer(recipe: Recipe, folder: Path, watcher: Watcher) -> Tokenizer:
    """The tokenizer of the recipe, trained on the text if it says so; saved in the folder."""
    home = folder / TOKENIZER_FOLDER
    if home.exists():
        return open_tokenizer(home)
    size = size_to_train(recipe.tokenizer)
    if size is None:
        tokenizer = make_tokenizer(recipe.tokenizer, f"{recipe.section}tokenizer")
    else:
        watcher.say(f"reading {recipe.source} to train {recipe.tokenizer}")
        read = documents(recipe.source, f"{recipe.section}source", recipe.form)
        if recipe.form is not None:
            read = (replace(document, text=unmarked(document.text)) for document in read)
        texts = sample(document for document in read if document.text)
        num_bytes = sum(len(text.encode()) for text in texts)
        watcher.say(f"training {recipe.tokenizer} on {len(texts):,} documents, {num_bytes / 1e6:,.1f} MB")
        cleaner = Cleaner(recipe.cleaning)
        cleaned = (cleaner.clean(text)[0] for text in texts)
        tokenizer = bpe.train((piece for text in cleaned for piece in bpe.segments(text, 1 << 14)), size)
        if tokenizer.vocab_size < size:
            watcher.say(f"the text has pairs for {tokenizer.vocab_size:,} tokens only, not {size:,}")
    save_tokenizer(tokenizer, home)
    return tokenizer


def _measure_overlap(folder: Path, num_processes: int) -> None:
    """Adds to the manifest how many of the distinct byte windows of validation occur in training too."""
    num_tokens = open_shards(folder).train.num_tokens
    ranges = [(begin, min(begin + _OVERLAP_TOKENS, num_tokens)) for begin in range(0, num_tokens, _OVERLAP_TOKENS)]
    if len(ranges) == 1 or num_processes == 1:
        marks = [_mark(folder, *each) for each in ranges]
    else:
        with make_pool(num_processes) as pool:
            marks = list(pool.map(_mark, [folder] * len(ranges), *zip(*ranges, strict=True)))
    result = _overlap_of(folder).result(np.logical_or.reduce(marks))
    manifest = read_manifest(folder)
    manifest["overlap"] = {**asdict(result), "fraction": round(result.fraction, 9), "told": result.describe()}
    write_manifest(folder, manifest)
    _overlap_of.cache_clear()


def _mark(folder: Path, begin: int, stop: int) -> np.ndarray:
    """Which windows of the validation text occur in these tokens of the training text."""
    shards, measured = open_shards(folder), _overlap_of(folder)
    found = measured.nothing_found()
    for chunk in shards.train.byte_chunks(shards.tokenizer.token_bytes, begin, stop):
        measured.mark(found, chunk)
    return found


@lru_cache(maxsize=1)
def _overlap_of(folder: Path) -> Overlap:
    """The windows of the validation text, made once in each process."""
    shards = open_shards(folder)
    validation = shards.validation
    return Overlap(validation.byte_chunks(shards.tokenizer.token_bytes, 0, validation.num_tokens), validation.num_bytes)

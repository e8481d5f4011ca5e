"""The corpus of a run: the sources of `data.source` as token shards, with their weights, under one tokenizer."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from tfdp.config import source_syntax
from tfdp.config.sections import DataConfig
from tfdp.data.examples import ExampleKeys, make_form
from tfdp.data.inputs import path_of
from tfdp.data.manifest import FORMAT_VERSION, SPLITS, Manifest
from tfdp.data.preparation import prepare
from tfdp.data.reading import Recipe, corpus_sha256
from tfdp.data.shards import Split, TokenShards, open_shards, open_tokenizer_of
from tfdp.data.tokenizers.tokenizer import Tokenizer, make_tokenizer, size_to_train
from tfdp.system.exits import ConfigError, require

TOKENS = "tokens:"


@dataclass(frozen=True)
class Source:
    """One source of a run."""

    name: str  # as `data.source` names it
    weight: Fraction  # share of the sequences
    shards: TokenShards


@dataclass(frozen=True)
class Corpus:
    """All sources of a run."""

    sources: Sequence[Source]
    tokenizer: Tokenizer

    @property
    def corpus_sha256(self) -> str:
        """Of the text of all sources."""
        return self._digest([source.shards.corpus_sha256 for source in self.sources])

    @property
    def split_sha256(self) -> str:
        """Of the token ids of all sources and their weights."""
        return self._digest([source.shards.split_sha256 for source in self.sources])

    @property
    def train(self) -> list[Split]:
        return [source.shards.train for source in self.sources]

    @property
    def validation(self) -> list[Split]:
        return [source.shards.validation for source in self.sources]

    @property
    def bytes_per_token(self) -> float:
        """Of the text that is trained on, by weight."""
        return sum(
            float(source.weight) * source.shards.train.num_bytes / source.shards.train.num_tokens
            for source in self.sources
        )

    def describe(self) -> list[str]:
        """A line for each source, for people."""
        if len(self.sources) == 1:
            return [f"{self.sources[0].name}: {self.sources[0].shards.describe()}"]
        return [
            f"{float(source.weight):.1%} of the sequences from {source.name}: {source.shards.describe()}"
            for source in self.sources
        ]

    def check_lengths(self, context_length: int) -> None:
        """Raises `ConfigError` for a split without text, or too short to hold one whole sequence."""
        for source in self.sources:
            for name in SPLITS:
                why = _why_short(source) if name == "validation" else ""
                fix = _longer_by(source, context_length) if name == "validation" else ""
                check_length(getattr(source.shards, name), name, context_length, source.name, why, fix)

    def _digest(self, digests: list[str]) -> str:
        if len(digests) == 1:
            return digests[0]
        weights = [str(source.weight) for source in self.sources]
        return hashlib.sha256(json.dumps([digests, weights]).encode()).hexdigest()


def check_length(split: Split, name: str, context_length: int, source: str = "", why: str = "", fix: str = "") -> None:
    """Raises `ConfigError` for a split without text, or too short to hold one whole sequence.

    Args:
      split: to check.
      name: of the split.
      context_length: tokens of a sequence, less one.
      source: that the split belongs to.
      why, fix: for the message: why the split is so short, and what makes it longer.
    """
    if split.num_documents == 0 or split.num_bytes == 0:
        raise ConfigError(f"data.source ({source}): the {name} split must not be empty: it holds no text")
    if split.num_tokens < context_length + 1:
        most = split.num_tokens - 1
        raise ConfigError(
            f"model.context_length ({context_length}) must fit into the {name} split, which has {split.num_tokens} "
            f"tokens{why}: try {f'{fix}, a context_length of {most},' if fix else most} or more text"
        )


def _why_short(source: Source) -> str:
    """The size of the validation split of a source, beside the rest of it."""
    train, validation = source.shards.train, source.shards.validation
    return (
        f" ({validation.num_documents:,} of the {train.num_documents + validation.num_documents:,} documents of "
        f"{source.name}; the largest for training has {train.largest_document:,} tokens)"
    )


def _longer_by(source: Source, context_length: int) -> str:
    """How to give a source a longer validation split: a larger fraction, if that is enough, or text of its own."""
    num_tokens = source.shards.train.num_tokens + source.shards.validation.num_tokens
    prefix = "tfdp.prepare --" if source.name.startswith(TOKENS) else "data."
    enough = [fraction for fraction in (0.05, 0.1, 0.2, 0.3, 0.5) if fraction * num_tokens >= 2 * (context_length + 1)]
    return ", ".join([f"{prefix}validation_fraction {each}" for each in enough[:1]] + [f"{prefix}validation_source"])


def cache_dir(config: DataConfig) -> Path:
    """Where token shards are kept: data.cache_dir, else $XDG_CACHE_HOME/tfdp, else ~/.cache/tfdp.

    Raises:
      ConfigError: none of them is there.
    """
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "tfdp"
    try:
        return Path.home() / ".cache" / "tfdp"
    except RuntimeError:
        raise ConfigError(
            "data.cache_dir (null) must be named where the user has no home directory: try --data.cache_dir cache"
        ) from None


def with_own_tokenizer(config: DataConfig, own: Path, recorded: str | None) -> DataConfig:
    """The text of a run with the tokenizer that its directory keeps, where the recorded one is gone.

    Any other name is somebody's wish: where nothing has it, that is a mistake to report.
    """
    address = config.tokenizer.partition(":")[2]
    is_gone = address and size_to_train(config.tokenizer) is None and not os.path.lexists(path_of(address))
    is_own = config.tokenizer == recorded and own.is_dir()
    return replace(config, tokenizer=f"bpe:{own}") if is_gone and is_own else config


def require_examples(config: DataConfig) -> None:
    """Raises `ConfigError` where the text of a run is to be examples, and no key says how records become some."""
    are_tokens = all(name.startswith(TOKENS) for name, _ in source_syntax.parse(config.source))
    rule = "must be named, or data.label_field, or data.messages_field: what is learned of a record"
    is_known = are_tokens or ExampleKeys.of(config).makes_examples
    require(is_known, "data.target_field", config.target_field, rule)


def example_keys(config: DataConfig) -> list[ExampleKeys]:
    """How the records of a run became examples: as its keys say, or the manifests of its shards, each way once.

    Empty where it has no examples, or where the shards of one source do not say: those of an earlier version, say.
    """
    own = ExampleKeys.of(config)
    if own.makes_examples:
        return [own]
    found = []
    for name, _ in source_syntax.parse(config.source):
        if not name.startswith(TOKENS):
            continue  # plain text
        try:
            manifest = Manifest.read(_folder_and_key(name)[0])
        except (OSError, ValueError):
            return []
        if manifest.has_flags and manifest.example_keys is None:
            return []
        found += [manifest.example_keys] if manifest.example_keys is not None else []
    return list(dict.fromkeys(found))


def require_whole_examples(config: DataConfig) -> None:
    """Raises `ConfigError` where examples would be cut in two, or see each other."""
    rule = "must be whole or documents: an example is not cut in two"
    require(config.sequences != "packed", "data.sequences", config.sequences, rule)
    rule = "must be true: examples do not see each other"
    require(config.document_attention, "data.document_attention", config.document_attention, rule)


def open_corpus(config: DataConfig, cache_dir: Path) -> Corpus:
    """Opens the sources of a run; those that are text become token shards in `cache_dir` first.

    There the name of a folder is a digest of the text and of the keys that shape its shards: a changed file or key
    makes other shards, and shards are made once, however many processes need them.

    Raises:
      ConfigError: a source is wrong or empty, or their tokenizers differ.
    """
    named = source_syntax.parse(config.source)
    opened = {name: open_shards(*_folder_and_key(name), cache_dir) for name, _ in named if name.startswith(TOKENS)}
    _check(config, [name for name, _ in named], opened)
    recipe_tokenizer = _tokenizer_name(config, list(opened))
    sources = [
        Source(name, weight, opened.get(name) or _from_cache(config, name, recipe_tokenizer, cache_dir))
        for name, weight in named
    ]
    first, *others = sources
    for source in others:
        if source.shards.tokenizer.fingerprint != first.shards.tokenizer.fingerprint:
            raise ConfigError(
                f"data.source: {source.name} must have the tokenizer of {first.name}: prepare it again with "
                f"--tokenizer bpe:FOLDER, where FOLDER is the folder tokenizer/ of the other one"
            )
    return Corpus(sources, first.shards.tokenizer)


def open_same_corpus(config: DataConfig, corpus_sha256: str) -> Corpus:
    """The text that a run was trained on. Raises `ConfigError` where the sources have changed."""
    corpus = open_corpus(config, cache_dir(config))
    require(
        corpus.corpus_sha256 == corpus_sha256,
        "data.source",
        config.source,
        f"must be the text that the run was trained on: its sha256 was {corpus_sha256[:12]}..., "
        f"and is {corpus.corpus_sha256[:12]}... now",
    )
    return corpus


def expected_vocab_size(config: DataConfig) -> int:
    """The number of token ids of a run, from the tokenizer's files alone: no text is read.

    Raises:
      ConfigError: those files are missing or wrong.
    """
    tokens = [name for name, _ in source_syntax.parse(config.source) if name.startswith(TOKENS)]
    if config.tokenizer == "auto" and tokens:
        return open_tokenizer_of(*_folder_and_key(tokens[0])).vocab_size
    size = size_to_train(config.tokenizer)
    return size or make_tokenizer(_tokenizer_name(config, [])).vocab_size


def _folder_and_key(name: str) -> tuple[Path, str]:
    return Path(name.removeprefix(TOKENS)), f"data.source: {TOKENS.rstrip(':')}"


def _check(config: DataConfig, names: list[str], opened: dict[str, TokenShards]) -> None:
    if config.validation_source is not None and (opened or len(names) > 1):
        raise ConfigError(
            f"data.validation_source ({config.validation_source}) must be null where data.source names token shards or "
            f"several sources, which bring their own: give --validation_source to tfdp.prepare"
        )
    if opened:
        _check_fields_of_shards(ExampleKeys.of(config), next(iter(opened)))
    if len(names) > 1 and len(opened) < len(names) and not opened and size_to_train(config.tokenizer):
        raise ConfigError(
            f"data.tokenizer ({config.tokenizer}) cannot be trained on several sources at once: train it on one with "
            f"tfdp.prepare --output DIR, and name it bpe:DIR/tokenizer"
        )
    if config.tokenizer != "auto":
        for name, shards in opened.items():
            wanted = None if size_to_train(config.tokenizer) else make_tokenizer(config.tokenizer)
            if wanted is None or wanted.fingerprint != shards.tokenizer.fingerprint:
                raise ConfigError(
                    f"data.tokenizer ({config.tokenizer}) must be auto or that of {name}, {shards.tokenizer.name}"
                )


def _check_fields_of_shards(keys: ExampleKeys, shards: str) -> None:
    """Raises `ConfigError` where fields of records are named, which shards do not have any more."""
    for name in ("input_field", "target_field", "label_field", "messages_field", "template"):
        value = getattr(keys, name)
        rule = f"must be left out with {shards}: give it to tfdp.prepare, which makes examples of records"
        require(value in (None, "auto"), f"data.{name}", value, rule)


def _tokenizer_name(config: DataConfig, opened: list[str]) -> str:
    """The tokenizer for the text sources: the one that is named, else that of the shards beside them, else bytes."""
    if config.tokenizer != "auto":
        return config.tokenizer
    return f"bpe:{opened[0].removeprefix(TOKENS)}/tokenizer" if opened else "bytes"


def _from_cache(config: DataConfig, source: str, tokenizer: str, cache_dir: Path) -> TokenShards:
    keys = ExampleKeys.of(config)
    form = make_form(keys, tokenizer, "data.")
    held_out = (config.validation_source, config.validation_fraction)
    own_keys = None if form is None else keys
    recipe = Recipe(source, *held_out, tokenizer, section="data.", form=form, example_keys=own_keys)
    # the text itself, not where it lies
    facts = {**recipe.facts(), "source": corpus_sha256(recipe), "validation_source": None}
    name = f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.{FORMAT_VERSION}"
    return prepare(recipe, cache_dir / name, "data.cache_dir", num_processes=os.cpu_count() or 1, facts=facts)

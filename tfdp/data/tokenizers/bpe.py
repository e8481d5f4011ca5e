"""Byte-level byte-pair encoding (Sennrich et al. 2016; over bytes: Radford et al. 2019, GPT-2).

A vocabulary trained here has end-of-text as id 0, the 256 bytes next, and the merges after them in their order, so it
encodes any text. It is stored as `vocabulary.json` and `merges.txt`, which keras_nlp's BytePairTokenizer loads. Others
may have more tokens, such as <|pad|>, and gaps between the ids; their ids are those of the library `tokenizers`.

Text is cut into pieces by a pattern first, and merged inside them only. There are two patterns: `gpt2`, as its
authors published it, and `keras`, which cuts as the graph path of keras_nlp.tokenizers.BytePairTokenizer does. They
differ in a few runs of white space: keras_nlp keeps "\\n\\n" before a word whole and cuts the last space off a text.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tfdp.data.tokenizers import vocabulary as vocabularies
from tfdp.data.tokenizers.vocabulary import (
    END_OF_TEXT,
    LARGEST_SIZE,
    MERGES_FILE,
    VOCABULARY_FILE,
    byte_characters,
    bytes_of,
)
from tfdp.system.exits import ConfigError
from tfdp.system.messages import shown

_GPT2 = r"'(?:s|t|re|ve|m|ll|d)| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WIDE_SPACES = r"\x{a0}\x{2009}\x{202f}\x{3000}"


def _keras_pattern() -> str:
    """What the two passes of keras_nlp's split come to, as one pattern.

    Its white space is RE2's and four characters more; a vertical tab counts as punctuation, but is cut off its end.
    """
    tabs = rf"\t\r\f{_WIDE_SPACES}"
    space, tab, other = rf"[ \n{tabs}]", rf"[{tabs}]", rf"[^ \n{tabs}\p{{L}}\p{{N}}]"
    no_space = rf"[^ \n{tabs}]"
    return "|".join(
        [
            r"'(?:s|t|re|ve|m|ll|d)",
            r" ?[\p{L}]+",
            r" ?[\p{N}]+",
            rf" (?=\x0b(?!{other}))| ?{other}+(?=\x0b(?!{other}))| ?{other}+",
            rf"{space}+(?= {no_space})",  # all but the space that begins the next word
            rf"{space}*\n(?!{space})|{space}+\n(?= +\z)",  # up to a line's end
            rf"{space}+(?={tab}(?:{no_space}| *\z))|{tab}(?={no_space})|(?<={space}){tab}(?= *\z)",
            rf"{space}+(?={space}\z)|{space}",
        ]
    )


PATTERNS = {"gpt2": _GPT2, "keras": _keras_pattern()}
# Between a character that is no white space and one that is, both patterns cut, whatever stands around them.
_CUT = re.compile(r"[^\s\x0b\x1c-\x1f](?=[ \n])")
_MAX_CACHED = 1 << 17  # pieces, of at most 32 characters: some 20 MB


class BytePairTokenizer:
    """A byte-level BPE vocabulary.

    Args:
      vocabulary: token -> id, tokens written as GPT-2 writes bytes.
      merges: pairs of tokens, "left right", the earliest first.
      pattern: keras or gpt2.
      where: what to blame: the configuration key, and where the vocabulary comes from.

    Raises:
      ConfigError: a byte has no token, a merge makes no token, ids are not distinct, or there is no end of text.
    """

    def __init__(
        self, vocabulary: dict[str, int], merges: list[str], pattern: str, where: str = "data.tokenizer"
    ) -> None:
        vocabularies.check(vocabulary, merges, where)
        self.vocabulary, self.merges, self.pattern = vocabulary, merges, pattern
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text = vocabulary[END_OF_TEXT]

    @property
    def name(self) -> str:
        return f"bpe, {self.vocab_size:,} tokens"

    @cached_property
    def fingerprint(self) -> str:
        told = json.dumps([sorted(self.vocabulary.items()), self.merges, PATTERNS[self.pattern]])
        return f"bpe-{self.vocab_size}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, uint32, shape (num_tokens,); `<|endoftext|>` in a text is text. Raises `ConfigError`."""
        try:
            parts = [self._encode_segment(segment) for segment in segments(text)]
        except UnicodeEncodeError as error:
            raise ConfigError(f"text ({text[error.start]!r} at {error.start}) must be valid Unicode") from None
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids; ends of text become blank lines, broken UTF-8 the replacement character."""
        table = self.token_bytes
        data = b"".join(b"\n\n" if index == self.end_of_text else table[index] for index in np.asarray(ids).tolist())
        return data.decode("utf-8", errors="replace")

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id; none for the end of text, and for an id without a token."""
        table = [b""] * self.vocab_size
        for token, index in self.vocabulary.items():
            if token != END_OF_TEXT:
                table[index] = bytes_of(token)
        return table

    def save(self, folder: Path) -> None:
        """Writes vocabulary.json and merges.txt, as keras_nlp reads them."""
        text = json.dumps(self.vocabulary, ensure_ascii=False, indent=0)
        (folder / VOCABULARY_FILE).write_text(text, encoding="utf-8")
        (folder / MERGES_FILE).write_text("".join(f"{merge}\n" for merge in self.merges), encoding="utf-8")

    def _encode_segment(self, text: str) -> np.ndarray:
        if not self._ranks_are_merges:
            return self._encode_by_reference(text)
        return self._encode_ascii(text) if text.isascii() else self._encode_unicode(text)

    def _encode_ascii(self, text: str) -> np.ndarray:
        """Ids of ASCII text: cut by `re`, which is fast on it, and looked up, because most of its words come again."""
        return np.frombuffer(b"".join(map(self._cache.__getitem__, self._cut_ascii(text))), dtype=np.uint32)

    def _encode_unicode(self, text: str) -> np.ndarray:
        try:
            return self._tiktoken.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # its matcher gives up on a million white spaces in a row
            return self._encode_by_reference(text)

    def _encode_by_reference(self, text: str) -> np.ndarray:
        return np.array(self._reference.encode(text).ids, dtype=np.uint32)

    @cached_property
    def _cache(self) -> "_Pieces":
        return _Pieces(self._make_tiktoken(r"(?s:.+)"))

    @cached_property
    def _cut_ascii(self) -> Callable[[str], list[str]]:
        """What the pattern cuts ASCII text into, in the grammar of `re`."""
        pattern = PATTERNS[self.pattern].replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9")
        return re.compile(pattern.replace(_WIDE_SPACES, "").replace(r"\z", r"\Z"), re.ASCII).findall

    @cached_property
    def _ranks_are_merges(self) -> bool:
        """Whether tiktoken, which joins two pieces whenever they make a token, joins them as the merges do.

        It does if ids grow in the order of the merges, each with a token of its own, and the merges make each token of
        its bytes: then no two pieces other than those of its merge can ever make it.
        """
        made = self._made_tokens
        ids = [max(self.vocabulary[char] for char in byte_characters()), *(self.vocabulary[token] for token in made)]
        in_order = all(low < high for low, high in itertools.pairwise(ids))
        return in_order and all(len(self._reference.model.tokenize(token)) == 1 for token in made)

    @cached_property
    def _made_tokens(self) -> list[str]:
        """What the merges make, in their order."""
        return [merge.replace(" ", "") for merge in self.merges]

    @cached_property
    def _tiktoken(self) -> Any:
        return self._make_tiktoken(PATTERNS[self.pattern])

    def _make_tiktoken(self, pattern: str) -> Any:
        import tiktoken

        tokens = [*byte_characters(), *self._made_tokens]
        ranks = {bytes_of(token): self.vocabulary[token] for token in tokens}
        return tiktoken.Encoding("tfdp", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @cached_property
    def _reference(self) -> Any:
        """The same vocabulary in `tokenizers`: slower, and indifferent to the order of the ids."""
        return reference(self.vocabulary, self.merges, self.pattern)


class _Pieces(dict[str, bytes]):
    """The ids of the pieces seen so far, as bytes of uint32."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def __missing__(self, piece: str) -> bytes:
        ids = self.encoder.encode_to_numpy(piece, disallowed_special=()).tobytes()
        if len(piece) <= 32 and len(self) < _MAX_CACHED:
            self[piece] = ids
        return ids


def train(texts: Iterable[str], vocab_size: int) -> BytePairTokenizer:
    """Learns a vocabulary of at most `vocab_size` tokens (fewer where the text has no more pairs to merge).

    Raises:
      ConfigError: a size that does not hold the bytes and the end of text.
    """
    from tokenizers import trainers

    checked_size(str(vocab_size))
    alphabet = byte_characters()
    learner = reference({}, [], "keras")
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
        ),
    )
    model = json.loads(learner.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return BytePairTokenizer(dict(sorted(model["vocab"].items(), key=lambda item: item[1])), merges, "keras")


def checked_size(digits: str) -> int:
    """The number of tokens to train. Raises `ConfigError` where it has no room for the bytes, or is too large."""
    size = int(digits) if len(digits) <= 20 else 0
    if not 257 <= size <= LARGEST_SIZE:
        raise ConfigError(f"tokenizer (bpe:{shown(digits)}) must name 257 to {LARGEST_SIZE:,} tokens: try bpe:8192")
    return size


def load(folder: Path, pattern: str, key: str) -> BytePairTokenizer:
    """Reads a vocabulary and its merges: vocabulary.json, vocab.json or encoder.json; merges.txt or vocab.bpe.

    Raises:
      ConfigError: a file is missing or not what it should be.
    """
    where = f"{key} ({shown(folder)})"
    return BytePairTokenizer(*vocabularies.read(folder, where), pattern, where)


def reference(vocabulary: dict[str, int], merges: list[str], pattern: str) -> Any:
    """The tokenizer of the library `tokenizers` with this vocabulary: what trains it, and what ids are held against."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[pattern]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def segments(text: str, size: int = 1 << 20) -> Iterator[str]:
    """Cuts a long text where its pieces end anyway, after about `size` characters, for encoders that hold a part."""
    start = 0
    while len(text) - start > 2 * size:
        cut = _CUT.search(text, start + size)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:] if start else text

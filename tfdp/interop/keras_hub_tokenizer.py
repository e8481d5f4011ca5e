"""Tokenizers of KerasHub presets: ours written as a GPT2Tokenizer, and theirs as `data.tokenizer` names them.

A GPT2Tokenizer begins a text with the end of text, as a document begins here. It serves with every backbone: those of
Llama, Qwen and Qwen3 want special tokens that a vocabulary of ours has no ids for.
"""

from pathlib import Path
from typing import Any

from tfdp.data import strict_json
from tfdp.data.tokenizers.bpe import BytePairTokenizer
from tfdp.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer
from tfdp.data.tokenizers.vocabulary import END_OF_TEXT, MERGES_FILE, VOCABULARY_FILE, byte_characters
from tfdp.system.exits import ConfigError
from tfdp.system.messages import one_line, shown

CONFIG_FILE, ASSETS = "tokenizer.json", Path("assets", "tokenizer")
_IN_GRAPH = "_allow_python_workflow"  # false: text is cut by the pattern `keras` of ours; else it is not cut at all
_NO_MERGES = ["#version: 0.2"]  # a head line, which KerasHub skips: it cannot make a table of no merges


def check(tokenizer: Tokenizer) -> None:
    """Raises `ConfigError` for a tokenizer that no class of KerasHub equals."""
    if isinstance(tokenizer, BytePairTokenizer):
        if tokenizer.merges and tokenizer.pattern != "keras":
            raise ConfigError(
                f"format (keras_hub) has no tokenizer that cuts text as GPT-2's pattern does ({tokenizer.name}): only "
                f"bpe:SIZE and bpe:FOLDER are written"
            )
    elif not isinstance(tokenizer, ByteTokenizer):
        raise ConfigError(
            f"format (keras_hub) has no tokenizer that equals this one ({tokenizer.name}): only bytes, bpe:SIZE and "
            f"bpe:FOLDER are written"
        )


def make_tokenizer(tokenizer: Tokenizer) -> Any:
    """A GPT2Tokenizer of KerasHub that gives the same ids. Raises `ConfigError` as `check`."""
    import keras_hub

    check(tokenizer)
    if isinstance(tokenizer, BytePairTokenizer):
        made = keras_hub.models.GPT2Tokenizer(
            vocabulary=tokenizer.vocabulary, merges=tokenizer.merges or _NO_MERGES, **{_IN_GRAPH: False}
        )
        config = made.get_config()  # lacks the key, which its constructor takes
        made.get_config = lambda: {**config, _IN_GRAPH: False}
        return made
    return keras_hub.models.GPT2Tokenizer(vocabulary=_byte_vocabulary(), merges=_NO_MERGES)


def _byte_vocabulary() -> dict[str, int]:
    """The bytes by their own numbers; that of the end of text, which UTF-8 never has, is no byte's."""
    characters, end_of_text = byte_characters(), ByteTokenizer.end_of_text
    return {characters[byte]: byte for byte in range(256) if byte != end_of_text} | {END_OF_TEXT: end_of_text}


def name_of(folder: Path, where: str) -> str:
    """As `data.tokenizer` names the tokenizer of a preset.

    Raises:
      ConfigError: the preset has none, or one that is not read here.
    """
    fix = "name another one as data.tokenizer"
    assets = folder / ASSETS
    try:
        content: Any = strict_json.parse((folder / CONFIG_FILE).read_bytes())
        kind = str(content["registered_name"]).rpartition(">")[2]
        in_graph = content["config"].get(_IN_GRAPH) is False
        if kind == "GPT2Tokenizer":
            merges = (assets / MERGES_FILE).read_text(encoding="utf-8").splitlines()
            vocabulary: Any = strict_json.parse((assets / VOCABULARY_FILE).read_bytes())
            if vocabulary == _byte_vocabulary() and merges in ([], _NO_MERGES):
                return "bytes"
            return f"{'bpe' if in_graph else 'gpt2'}:{assets}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or one_line(str(error))
        raise ConfigError(f"{where} must hold a tokenizer of KerasHub: {reason}: {fix}") from None
    if (assets / "vocabulary.spm").is_file():
        return f"sentencepiece:{assets / 'vocabulary.spm'}"
    raise ConfigError(f"{where} has a tokenizer that tfdp does not read ({shown(kind)}): {fix}")


def sequence_length(folder: Path, where: str) -> int:
    """The tokens of a text that the preprocessor of a preset keeps; 1024, KerasHub's default, where it has none.

    Raises:
      ConfigError: a damaged file.
    """
    path = folder / "preprocessor.json"
    if not path.is_file():
        return 1024
    try:
        content: Any = strict_json.parse(path.read_bytes())
        return int(content["config"].get("sequence_length") or 1024)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where} must hold a whole preprocessor.json: {one_line(str(error))}") from None

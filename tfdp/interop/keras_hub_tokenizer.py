"""Tokenizers of KerasHub presets: ours in a class of KerasHub, and theirs as `data.tokenizer` names them.

The class is that of GPT-2 or OPT, whatever the backbone: they begin a text with the end of text, as a document begins
here, while those of Llama, Qwen and Qwen3 want special tokens that a vocabulary of ours has no ids for.
"""

from pathlib import Path
from typing import Any

from tfdp.data import strict_json
from tfdp.data.tokenizers.bpe import BytePairTokenizer
from tfdp.data.tokenizers.tokenizer import KIND_FILE, ByteTokenizer, Tokenizer, save_tokenizer
from tfdp.data.tokenizers.vocabulary import END_OF_TEXT, byte_characters
from tfdp.system.exits import ConfigError
from tfdp.system.messages import one_line, shown

CONFIG_FILE, ASSETS, OWN_FOLDER = "tokenizer.json", Path("assets", "tokenizer"), "tfdp_tokenizer"
_PREPROCESSOR_FILE = "preprocessor.json"
_IN_GRAPH = "_allow_python_workflow"  # false: text is cut by our pattern `keras`; else it is not cut at all
_NO_MERGES = ["#version: 0.2"]  # a head line, which KerasHub skips: it cannot make a table of no merges
_OPT_END, _OPT_PADDING = "</s>", "<pad>"
_NO_BYTE = byte_characters()[0xFF]  # the token of a byte that UTF-8 never has


def check(tokenizer: Tokenizer) -> None:
    """Raises `ConfigError` for a tokenizer that no class of KerasHub equals."""
    told = f"format (keras_hub) has no tokenizer that equals this one ({tokenizer.name})"
    if isinstance(tokenizer, ByteTokenizer):
        return
    if not isinstance(tokenizer, BytePairTokenizer):
        raise ConfigError(f"{told}: only bytes, bpe:SIZE and bpe:FOLDER are written")
    if tokenizer.merges and tokenizer.pattern != "keras":
        raise ConfigError(f"{told}: KerasHub cuts text as bpe:FOLDER does, and gpt2:FOLDER cuts it as GPT-2 did")
    for token in (_OPT_END, _OPT_PADDING) if tokenizer.end_of_text == 0 else ():
        if token in tokenizer.vocabulary:
            raise ConfigError(f"{told}: its vocabulary has {token}, which is a special token there")


def make_tokenizer(tokenizer: Tokenizer) -> Any:
    """A tokenizer of KerasHub that gives the same ids. Raises `ConfigError` as `check`."""
    import keras_hub

    check(tokenizer)
    kind, in_graph = keras_hub.models.GPT2Tokenizer, isinstance(tokenizer, BytePairTokenizer)
    vocabulary, merges = _vocabulary(tokenizer), getattr(tokenizer, "merges", []) or _NO_MERGES
    if tokenizer.end_of_text == 0:
        # GPT-2's fills up with id 0, which would be the end of text here, and end every text before it begins.
        names = {END_OF_TEXT: _OPT_END, _NO_BYTE: _OPT_PADDING}
        vocabulary = {names.get(token, token): index for token, index in vocabulary.items()}
        merges = [merge for merge in merges if _NO_BYTE not in merge]
        kind = keras_hub.models.OPTTokenizer
    if not in_graph:
        return kind(vocabulary=vocabulary, merges=merges)
    made = kind(vocabulary=vocabulary, merges=merges, **{_IN_GRAPH: False})
    config = made.get_config()  # lacks the key, which its constructor takes
    made.get_config = lambda: {**config, _IN_GRAPH: False}
    return made


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    if isinstance(tokenizer, BytePairTokenizer):
        return tokenizer.vocabulary
    end_of_text = tokenizer.end_of_text
    return {char: byte for byte, char in enumerate(byte_characters()) if byte != end_of_text} | {
        END_OF_TEXT: end_of_text
    }


def write_own(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer in the form of tfdp too, beside the files of KerasHub, which leave something out."""
    save_tokenizer(tokenizer, folder / OWN_FOLDER)


def name_of(folder: Path, where: str) -> str:
    """As `data.tokenizer` names the tokenizer of a preset.

    Raises:
      ConfigError: the preset has none, or one that is not read here.
    """
    if (folder / OWN_FOLDER / KIND_FILE).is_file():
        return f"bpe:{folder / OWN_FOLDER}"  # of whatever kind: the folder says
    fix = "name another one as data.tokenizer"
    try:
        content: Any = strict_json.parse((folder / CONFIG_FILE).read_bytes())
        kind = str(content["registered_name"]).rpartition(">")[2]
        in_graph = content["config"].get(_IN_GRAPH) is False
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or one_line(str(error))
        raise ConfigError(f"{where} must hold the {CONFIG_FILE} of a KerasHub preset ({reason}): {fix}") from None
    if kind == "GPT2Tokenizer":
        return f"{'bpe' if in_graph else 'gpt2'}:{folder / ASSETS}"
    if (folder / ASSETS / "vocabulary.spm").is_file():
        return f"sentencepiece:{folder / ASSETS / 'vocabulary.spm'}"
    raise ConfigError(f"{where} has a tokenizer that tfdp does not read ({shown(kind)}): {fix}")


def sequence_length(folder: Path, where: str) -> int:
    """The tokens of a text that the preprocessor of a preset keeps; 1024, KerasHub's default, where it has none.

    Raises:
      ConfigError: a damaged file.
    """
    if not (folder / _PREPROCESSOR_FILE).is_file():
        return 1024
    try:
        content: Any = strict_json.parse((folder / _PREPROCESSOR_FILE).read_bytes())
        return int(content["config"].get("sequence_length") or 1024)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where} must hold a whole {_PREPROCESSOR_FILE}: {one_line(str(error))}") from None

"""Tokenizers in the files of Hugging Face: `tokenizer.json`, which the library `tokenizers` runs, and its companions.

A document begins with the end of text here, so `tokenizer.json` puts that before a text, as others put a beginning of
sequence. A text that contains `<|endoftext|>` itself means the special token there, and its characters here.
"""

import json
from pathlib import Path
from typing import Any

from tfdp.data.tokenizers import bpe
from tfdp.data.tokenizers.hugging_face import TOKENIZER_FILE, HuggingFaceTokenizer
from tfdp.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer
from tfdp.data.tokenizers.vocabulary import END_OF_TEXT, byte_characters
from tfdp.system.exits import ConfigError


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json into a folder.

    Raises:
      ConfigError: a tokenizer that has no such form.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.save(folder)
        return
    made = _library_tokenizer(tokenizer)
    made.save(str(folder / TOKENIZER_FILE))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _library_tokenizer(tokenizer: Tokenizer) -> Any:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as LibraryTokenizer

    if isinstance(tokenizer, ByteTokenizer):
        characters = byte_characters()
        vocabulary = {characters[byte]: byte for byte in range(256) if byte != tokenizer.end_of_text}
        vocabulary[END_OF_TEXT] = tokenizer.end_of_text
        made = LibraryTokenizer(models.BPE(vocabulary, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    elif isinstance(tokenizer, bpe.BytePairTokenizer):
        made = bpe.reference(tokenizer.vocabulary, tokenizer.merges, tokenizer.pattern)
    else:
        raise ConfigError(f"format (huggingface) has no {TOKENIZER_FILE} for this tokenizer ({tokenizer.name})")
    made.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    made.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.end_of_text)]
    )
    return made

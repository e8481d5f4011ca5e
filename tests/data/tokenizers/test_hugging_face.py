"""Tokenizers of Hugging Face folders: text is text, prompts know special tokens, and what is no such folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from tfdp.data.tokenizers.tokenizer import make_tokenizer, open_tokenizer, prompt_ids, save_tokenizer
from tfdp.system.exits import ConfigError

TEXTS = ["the quick brown fox", "jumps over the lazy dog", "naïve café 漢字", "<|end|> is no end here", ""]


@pytest.fixture(scope="module", params=["byte level", "metaspace"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json with an end, a beginning of sequence, and a token that is added but not special."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level = request.param == "byte level"
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=not byte_level, unk_token=None))
    if byte_level:
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = []
    special = ["<|end|>", "<|begin|>", *([] if byte_level else [f"<0x{byte:02X}>" for byte in range(256)])]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS[:3] * 10, trainer)
    facts = json.loads(made.to_str())
    facts["added_tokens"] = [each for each in facts["added_tokens"] if each["content"].startswith("<|")]
    made = tokenizers.Tokenizer.from_str(json.dumps(facts))
    made.add_tokens([AddedToken("lazy", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_texts_come_back_and_count_their_bytes(folder: Path) -> None:
    tokenizer = make_tokenizer(f"huggingface:{folder}")
    assert tokenizer.end_of_text == 0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert 0 not in ids, "what looks like a special token in a document is text"
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes[index] for index in ids.tolist()) == text.encode()
    assert tokenizer.decode(np.array([*tokenizer.encode("the"), 0, *tokenizer.encode("fox")])) == "the\n\nfox"


def test_a_prompt_begins_as_the_file_says_and_knows_special_tokens(folder: Path) -> None:
    tokenizer = make_tokenizer(f"huggingface:{folder}")
    assert prompt_ids(tokenizer, "the fox").tolist() == [1, *tokenizer.encode("the fox").tolist()]
    assert 0 in prompt_ids(tokenizer, "the<|end|>fox")


def test_it_is_kept_with_all_that_belongs_to_it(folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(f"huggingface:{folder}")
    save_tokenizer(tokenizer, tmp_path / "kept")
    again = open_tokenizer(tmp_path / "kept")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()
    assert (tmp_path / "kept" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, r"must be a folder with a tokenizer\.json"),
        ("tokenizer.json", "{", r"must hold a tokenizer\.json of the library tokenizers: "),
        ("tokenizer.json", '{"model": {}}', r"must hold a tokenizer\.json of the library tokenizers: "),
        ("tokenizer_config.json", "{}", r"must name its end of text: eos_token in tokenizer_config\.json"),
        ("tokenizer_config.json", "[", r"must hold whole JSON files: "),
        ("tokenizer_config.json", '{"eos_token": "<|nowhere|>"}', r"must name its end of text"),
    ],
)
def test_what_is_no_such_folder_is_one_line(
    folder: Path, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        make_tokenizer(f"huggingface:{tmp_path}")
    assert str(caught.value).isprintable()

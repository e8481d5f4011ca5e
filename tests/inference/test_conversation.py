"""Conversations: the ids that a model answers, the end of an answer, what is forgotten, and the command."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from commands import LONG
from tokenizers import decoders, models, pre_tokenizers, trainers

import tfdp
from tfdp.data.chat import CHATML, ChatTemplate, JinjaTemplate, RoleTemplates, chat_template
from tfdp.data.encoding import example_ids
from tfdp.data.examples import Conversations
from tfdp.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer, make_tokenizer
from tfdp.inference.conversation import Conversation
from tfdp.inference.language_model import LanguageModel
from tfdp.system.exits import ConfigError
from tfdp.tasks.flags import ID_MASK

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
OWN_TEMPLATE = """{%- if messages[0].role != "system" %}<|im_start|>system
Be kind.<|im_end|>
{% endif -%}
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ROLES = RoleTemplates({"user": "Q:{content}\n", "assistant": "A: {content};\n"})
TURNS = [("Hi there", "Hello"), ("How are you?", "Fine, and you"), ("So am I", " spaced ")]


def save_tokenizer(folder: Path) -> Path:
    """Byte-level BPE with the special tokens and a chat template of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["system user assistant", *(text for turn in TURNS for text in turn)] * 10, trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "chat_template.jinja").write_text(OWN_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(f"huggingface:{save_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'own')}")


class Answers:
    """In place of a model: the answers in turn; keeps what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), []  # type: ignore[var-annotated]

    def __call__(self, ids: Any, config: Any, ends: Any) -> Iterator[str]:
        self.asked.append((list(ids), config, ends))
        return iter(self.answers[(len(self.asked) - 1) % len(self.answers)])


def talk(
    answers: Answers,
    template: ChatTemplate = CHATML,
    tokenizer: Tokenizer | None = None,
    length: int = 10_000,
    of_run: bool = True,
    system: str | None = None,
) -> Conversation:
    return Conversation(answers, tokenizer or ByteTokenizer(), template, length, of_run, system)


@pytest.mark.parametrize("template", [CHATML, ROLES, None], ids=["chatml", "roles", "own"])
@pytest.mark.parametrize("tokenizer", ["bytes", "own"])
def test_a_run_is_asked_with_the_ids_of_its_documents(
    template: ChatTemplate | None, tokenizer: str, own: Tokenizer
) -> None:
    tools = ByteTokenizer() if tokenizer == "bytes" else own
    template = template or JinjaTemplate(OWN_TEMPLATE, {})
    answers = Answers(*(answer for _, answer in TURNS))
    conversation = talk(answers, template, tools)
    assert [conversation.say(text) for text, _ in TURNS] == [answer for _, answer in TURNS]
    form = Conversations("messages", template)
    for number, (asked, _, _) in enumerate(answers.asked, 1):
        messages = conversation.messages[: 2 * number]
        document = example_ids(tools, form.text([messages], "line 1, field")) & ID_MASK
        assert asked[0] == tools.end_of_text
        assert asked[1:] == document[: len(asked) - 1].tolist()
        rest = tools.decode(document[len(asked) - 1 :])
        assert rest.startswith(
            TURNS[number - 1][1].strip() if template not in (CHATML, ROLES) else TURNS[number - 1][1]
        )


def test_a_folder_of_another_library_is_asked_with_the_whole_text(own: Tokenizer) -> None:
    answers = Answers("Hello")
    conversation = talk(answers, chat_template("auto", own, "template"), own, of_run=False)
    conversation.say("Hi there")
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    assert answers.asked[0][0] == own.markup(text).tolist()  # type: ignore[attr-defined]
    silent = talk(answers, JinjaTemplate("", {}), own, of_run=False)
    silent.say("Hi")
    assert answers.asked[1][0] == [own.end_of_text]


@pytest.mark.parametrize(
    ("template", "tokenizer", "ends", "stop"),
    [
        (CHATML, "own", (2,), ("x",)),
        (CHATML, "bytes", (), ("x", "<|im_end|>")),
        (ROLES, "own", (), ("x", ";")),
        (RoleTemplates({"user": "{content}\n", "assistant": "{content}\n"}), "bytes", (), ("x",)),
    ],
)
def test_an_answer_ends_where_the_template_ends_it(
    template: ChatTemplate, tokenizer: str, ends: tuple[int, ...], stop: tuple[str, ...], own: Tokenizer
) -> None:
    answers = Answers("a")
    talk(answers, template, own if tokenizer == "own" else None).say("Hi", stop=["x"])
    assert answers.asked[0][1].stop == stop and answers.asked[0][2] == ends


def test_the_oldest_turns_are_forgotten_and_the_system_prompt_stays() -> None:
    answers = Answers("yes")
    conversation = talk(answers, length=300, system="Be brief.")
    for number in range(6):
        conversation.say(f"turn {number}", num_tokens=60)
        assert len(answers.asked[-1][0]) <= 240
    assert conversation.num_forgotten > 0
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
    assert len(conversation.messages) == 1 + 2 * (6 - conversation.num_forgotten)
    assert conversation.messages[-2]["content"] == "turn 5"
    before = conversation.messages
    with pytest.raises(ConfigError, match=r"^this turn must fit into 240 of the 300 tokens of the context, and takes"):
        conversation.say("x" * 300, num_tokens=60)
    assert conversation.messages == before
    conversation.say("hi", num_tokens=5000)  # half of the context is left for the prompt
    assert 60 < len(answers.asked[-1][0]) <= 150
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}] and conversation.num_forgotten == 0


def test_an_answer_that_is_closed_keeps_what_came() -> None:
    conversation = talk(Answers("abcdef", " "))
    pieces = conversation.stream("Hi")
    assert next(pieces) + next(pieces) == "ab"
    pieces.close()
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ab"}]
    assert conversation.messages == said
    assert conversation.say("And?") == " " and conversation.messages == said  # no answer, no turn


def test_mistakes_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^the conversation: data.template must have a text for the role system"):
        talk(Answers("a"), ROLES, system="Be brief.")
    with pytest.raises(ConfigError, match=r"^text \(\s*\) must not be empty"):
        talk(Answers("a")).say(" ")
    with pytest.raises(ConfigError, match=r"^temprature \(0\) must be one of num_tokens"):
        talk(Answers("a")).say("Hi", temprature=0)
    refusing = JinjaTemplate("{{ raise_exception('no system prompt') if messages[0].role == 'system' }}", {})
    with pytest.raises(ConfigError, match=r"refuses it: no system prompt$"):
        talk(Answers("a"), refusing, system="Be brief.")


# --- A run, and the command ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bytes", "own"])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to answer "ok" to whatever is said."""
    folder = tmp_path_factory.mktemp("chat")
    records = [
        {"messages": [{"role": "user", "content": f"Say {word}"}, {"role": "assistant", "content": "ok"}] * 2}
        for word in "abcdefghijklmnopqrstuvwxyz"
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    name = "bytes" if request.param == "bytes" else f"huggingface:{save_tokenizer(folder / 'own')}"
    data = {"source": f"jsonl:{folder}/chats.jsonl", "messages_field": "messages", "validation_fraction": 0.2}
    tfdp.train(
        {"run_dir": str(folder / "run"), "trainer": "instruction", "data": {**data, "tokenizer": name}},
        model={"num_layers": 1, "num_heads": 2, "model_dim": 32, "context_length": 256},
        training={"steps": 60, "global_batch_size": 4, "sample_tokens": 0, "jit_compile": False},
    )
    return folder / "run"


def test_a_run_answers_as_it_was_trained(run_dir: Path) -> None:
    model = tfdp.load(str(run_dir))
    conversation = model.chat()
    assert conversation.say("Say b", temperature=0, num_tokens=20) == "ok"
    ids = conversation.prompt_ids([*conversation.messages, {"role": "user", "content": "Say c"}])
    assert conversation.say("Say c", temperature=0, num_tokens=20) == "ok"
    assert greedy(model, ids, 2).startswith("ok")
    assert len(conversation.messages) == 4


def greedy(model: LanguageModel, ids: list[int], num_tokens: int) -> str:
    """By a whole forward pass for each token."""
    found = list(ids)
    for _ in range(num_tokens):
        found.append(int(model.logits(found)[-1].argmax()))
    return model.tokenizer.decode(np.array(found[len(ids) :]))


def test_a_run_on_pairs_needs_a_template(tmp_path: Path) -> None:
    records = "".join(json.dumps({"q": f"{number}?", "a": "yes"}) + "\n" for number in range(30))
    (tmp_path / "pairs.jsonl").write_text(records)
    data = {"source": f"jsonl:{tmp_path}/pairs.jsonl", "input_field": "q", "target_field": "a"}
    tfdp.train(
        {"run_dir": str(tmp_path / "run"), "trainer": "instruction", "data": {**data, "validation_fraction": 0.2}},
        model={"num_layers": 1, "num_heads": 2, "model_dim": 16, "context_length": 32},
        training={"steps": 1, "global_batch_size": 2, "sample_tokens": 0, "jit_compile": False},
    )
    model = tfdp.load(str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"^template \(auto\) must be named for a run that learned no conversations"):
        model.chat()
    own = model.chat(template='{"user": "{content}\\n", "assistant": "{content}"}')
    assert own.prompt_ids([{"role": "user", "content": "1?"}]) == [255, *b"1?\n"]


def command(run_dir: Path, *arguments: str) -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "tfdp.chat", f"--run_dir={run_dir}", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=run_dir, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_each_line_of_the_input_is_a_turn(run_dir: Path) -> None:
    lines = ["Say a", "", "/help", "/what now", "/reset", "x" * 300, "Say b", "Say c", "/exit", "Say d"]
    process = command(run_dir, "--num_tokens=20", "--temperature=0")
    out, error = process.communicate("\n".join(lines), timeout=LONG)
    assert (process.returncode, out) == (0, "ok\nok\nok\n"), error
    notes = [line for line in error.splitlines() if line.startswith(("/", "note", "error"))]
    assert [line.split()[0] for line in notes[:3]] == ["/reset", "/exit", "/help"]
    assert notes[3] == "note: /what is none of /reset, /exit, /help: not sent"
    assert notes[4].startswith("error: this turn must fit into 236 of the 256 tokens of the context, and takes ")
    process = command(run_dir, "--num_tokens=120", "--system=Be brief.", "--temperature=0")
    out, error = process.communicate("Say a\nSay b\nSay c\n", timeout=LONG)
    assert process.returncode == 0 and len(out.splitlines()) == 3, error
    is_long = not (run_dir.parent / "own").exists()  # a byte is a token
    assert ("note: turns forgotten, to fit into the context: 1" in error) == is_long


@pytest.mark.slow
def test_an_interrupt_ends_an_answer_and_at_the_prompt_the_command(run_dir: Path) -> None:
    """A template whose end the run never writes: the answer goes on for as long as it is let."""
    template = '{"user": "{content}", "assistant": "{content}"}'
    process = command(run_dir, "--num_tokens=1000000", "--temperature=5", f"--template={template}")
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    try:
        process.stdin.write("abc\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdin.write("/what\n")  # it listens again
        process.stdin.flush()
        while "/what" not in (line := process.stderr.readline()):
            assert line, "ended early"
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=LONG)
    finally:
        process.kill()
    assert (process.returncode, error) == (0, "") and out.endswith("\n")

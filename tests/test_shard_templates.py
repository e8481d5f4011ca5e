"""Shards and runs on them know how records became examples, so that a model is asked as it was trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tfdp
from tfdp import predict
from tfdp.config.sections import DataConfig
from tfdp.data import sources
from tfdp.data.examples import ExampleKeys, make_form, save_keys
from tfdp.data.manifest import EXAMPLE_KEYS, read_manifest, write_manifest
from tfdp.data.preparation import prepare
from tfdp.data.reading import Recipe
from tfdp.inference.trained import TrainedModel
from tfdp.system.exits import ConfigError

TEMPLATE = '{"user": "Q:{content}\\n", "assistant": "A:{content};\\n"}'
CHATS = ExampleKeys(TEMPLATE, messages_field="messages")
PAIRS = ExampleKeys("{input} is {label}", "text", label_field="mood")


def make_shards(folder: Path, keys: ExampleKeys) -> Path:
    """Shards of 40 small records, made as those of `tfdp.prepare`."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok"}]
    records = [
        {"text": f"{number}?", "body": "so", "mood": ["good", "bad"][number % 2], "messages": turns}
        for number in range(40)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    form = make_form(keys, "bytes", "")
    given = {} if form is None else {"form": form, "example_keys": keys}
    output = folder / f"shards-{len(list(folder.iterdir()))}"
    prepare(Recipe(f"jsonl:{folder}/records.jsonl", None, 0.2, "bytes", **given), output)  # type: ignore[arg-type]
    return output


def train(folder: Path, trainer: str, shards: Path, **keys: Any) -> Path:
    """A run of one step, whose shards are gone."""
    tfdp.train(
        {"run_dir": str(folder / "run"), "trainer": trainer, "data": {"source": f"tokens:{shards}"}, **keys},
        model={"num_layers": 1, "num_heads": 2, "model_dim": 16, "context_length": 64},
        training={"steps": 1, "global_batch_size": 2, "sample_tokens": 0, "jit_compile": False},
    )
    shutil.rmtree(shards)
    return folder / "run"


def test_a_manifest_says_how_records_became_examples(tmp_path: Path) -> None:
    chats, pairs, plain = (make_shards(tmp_path, keys) for keys in (CHATS, PAIRS, ExampleKeys()))

    def found(*names: Path) -> list[ExampleKeys]:
        return sources.example_keys(DataConfig(source=" + ".join(f"1 * tokens:{name}" for name in names)))

    assert read_manifest(chats)[EXAMPLE_KEYS]["template"] == TEMPLATE and EXAMPLE_KEYS not in read_manifest(plain)
    assert found(chats) == [CHATS] and found(plain) == []
    same = shutil.copytree(chats, tmp_path / "same")
    assert found(chats, pairs, plain, same) == [CHATS, PAIRS]
    assert sources.example_keys(DataConfig(source="jsonl:a.jsonl", messages_field="m")) == [
        ExampleKeys(messages_field="m")
    ]
    earlier = read_manifest(chats)
    del earlier[EXAMPLE_KEYS]
    write_manifest(chats, earlier)
    assert found(chats) == found(pairs, chats) == []  # nobody knows
    assert found(tmp_path / "none") == []


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    return train(folder, "instruction", make_shards(folder, CHATS))


def prompt(run: Path, template: str = "auto") -> bytes:
    asked = tfdp.load(str(run)).chat(template=template).prompt_ids([{"role": "user", "content": "Hi"}])
    assert asked[0] == 255
    return bytes(asked[1:])


def test_a_run_on_shards_is_asked_as_they_were_made(chat_run: Path, tmp_path: Path) -> None:
    assert prompt(chat_run) == b"Q:Hi\nA:"
    run = shutil.copytree(chat_run, tmp_path / "run")
    (run / "examples.json").unlink()  # as of shards of an earlier version
    assert prompt(run) == b"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    save_keys(run / "examples.json", [CHATS, replace(CHATS, messages_field="other")])
    assert prompt(run) == b"Q:Hi\nA:"


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        ([CHATS, ExampleKeys(messages_field="m")], "must be named for a run whose shards have several: try chatml"),
        ([CHATS, PAIRS], "must be named for a run whose shards have several: try chatml"),
        ([PAIRS], "must be named for a run that learned no conversations, but pairs: try chatml, or tfdp.generate"),
    ],
)
def test_a_run_without_one_chat_template_asks_for_it(
    chat_run: Path, tmp_path: Path, ways: list[ExampleKeys], message: str
) -> None:
    run = shutil.copytree(chat_run, tmp_path / "run")
    save_keys(run / "examples.json", ways)
    with pytest.raises(ConfigError) as caught:
        prompt(run)
    assert str(caught.value) == f"template (auto) {message}"
    assert prompt(run, "chatml").startswith(b"<|im_start|>user\nHi")


def test_a_damaged_file_of_a_run_is_one_line(chat_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(chat_run, tmp_path / "run")
    path = run / "examples.json"
    path.write_text(path.read_text().replace("Q:", "U:"))
    with pytest.raises(ConfigError, match=r"run_dir \(.*examples.json\) must be as the run wrote it: its content is n"):
        tfdp.load(str(run))


def test_predict_knows_the_template_of_the_shards(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, PAIRS)
    run = train(tmp_path, "classification", shards, labels=["good", "bad"])
    (tmp_path / "new.jsonl").write_text('{"text": "now?"}\n{"text": "then?", "mood": "good"}\n')
    config = predict.Config(run_dir=str(run), input=str(tmp_path / "new.jsonl"))

    def prompts() -> list[tuple[int, bytes]]:
        found = predict._prompts(config, TrainedModel.open(str(run), "best", "used to predict"))
        return [(number, bytes(ids[1:])) for number, ids in found]

    assert prompts() == [(1, b"now? is "), (2, b"then? is ")]
    save_keys(run / "examples.json", [PAIRS, replace(PAIRS, input_field="body")])
    with pytest.raises(ConfigError, match=r"must be a run on examples of one template and of the same fields: those"):
        prompts()
    (run / "examples.json").unlink()
    with pytest.raises(ConfigError, match=r"must be a run that read its records itself: its shards, of an earlier ver"):
        prompts()

"""The recipe `instruction`: answers alone are learned, in any layout, resumed and replayed as any run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from commands import assert_refused, losses, summary, tfdp, train_in_layouts, without_tensorflow

from tfdp.config.sections import ModelConfig
from tfdp.models.gpt import GPT
from tfdp.tasks.answers import Answers, read_examples
from tfdp.tasks.flags import STARTS, UNSCORED
from tfdp.tasks.task import row_losses

SIZE = ["--model.num_layers=2", "--model.num_heads=2", "--model.model_dim=32", "--model.context_length=64"]
SHORT = ["--training.steps=12", "--training.global_batch_size=8", "--training.sample_tokens=0"]
KEYS = ["--trainer=instruction", "--data.validation_fraction=0.1", "--training.log_every=1", *SIZE]
PAIRS = ["--data.source=jsonl:pairs.jsonl", "--data.input_field=question", "--data.target_field=answer"]
CHATS = ["--data.source=jsonl:chats.jsonl", "--data.messages_field=messages"]
END = 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instruction")
    pairs = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(20) for b in range(10)]
    chats = [
        {"messages": [{"role": "user", "content": f"Say {word}"}, {"role": "assistant", "content": f"{word}!"}] * turns}
        for word in ("cat", "dog", "bird", "fish")
        for turns in (1, 2)
        for _ in range(10)
    ]
    for name, records in (("pairs", pairs), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def two_examples() -> np.ndarray:
    """A row of two examples: prompts "ab" and "cd", answers "XY" and "Z"."""
    seen, said = [ord(each) | UNSCORED for each in "abcd"], [ord(each) for each in "XYZ"]
    start = END | STARTS
    return np.array([[start, *seen[:2], *said[:2], start, *seen[2:], said[2], END, -1, -1]], np.int32)


def test_a_row_of_examples_is_inputs_and_answers() -> None:
    examples = read_examples(tf.constant(two_examples()))
    np.testing.assert_array_equal(examples.inputs[0], [END, 97, 98, 88, 89, END, 99, 100, 90, END, 0])
    batch = Answers().batch({"tokens": tf.constant(two_examples())})
    np.testing.assert_array_equal(batch.targets[0], [-1, -1, 88, 89, END, -1, -1, 90, END, -1, -1])
    np.testing.assert_array_equal(np.flatnonzero(batch.attention.starts[0]), [0, 5])  # type: ignore[union-attr]
    whole = Answers(with_prompts=True).batch({"tokens": tf.constant(two_examples())})
    np.testing.assert_array_equal(whole.targets[0], [97, 98, 88, 89, END, 99, 100, 90, END, -1, -1])


def test_the_target_of_a_prompt_moves_no_loss_and_no_example_sees_another() -> None:
    """That a prompt's token would be predicted well or badly has no gradient; the second example knows no first."""
    model = GPT(ModelConfig(num_layers=1, num_heads=2, model_dim=16, context_length=11, zero_init=False), 256)
    loss = row_losses(Answers(), model)

    def gradients(tokens: np.ndarray) -> list[np.ndarray]:
        rows = {"tokens": tf.constant(tokens), "position": tf.zeros([1], tf.int64), "source": tf.zeros([1], tf.int32)}
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(loss(rows, tf.constant(0))[0])
        found = tape.gradient(total, [each.value for each in model.trainable_variables])
        return [total.numpy(), *(tf.convert_to_tensor(each).numpy() for each in found)]

    prompt_alone = np.full((1, 12), -1, np.int32)
    prompt_alone[:, :3] = two_examples()[:, :3]
    assert all(not np.any(each) for each in gradients(prompt_alone))

    of_second = two_examples()  # of the first example nothing is learned
    of_second[0, :6] |= UNSCORED
    after_another = of_second.copy()
    after_another[0, 1:5] = of_second[0, [2, 1, 4, 3]]
    for one, other in zip(gradients(of_second)[:1], gradients(after_another)[:1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "data", [pytest.param(PAIRS, marks=pytest.mark.full, id="pairs"), pytest.param(CHATS, id="chats")]
)
def test_a_run_on_examples_is_one_run_in_any_layout_and_after_a_stop(folder: Path, data: list[str]) -> None:
    own = data[0].partition(":")[2].partition(".")[0]
    keys = [*KEYS, *data, *SHORT]
    for name in train_in_layouts(folder, own, keys):
        np.testing.assert_allclose(losses(folder / name), losses(folder / f"{own}_one"), rtol=1e-5)
        found = summary(folder / name)["validation_loss"]
        assert found == pytest.approx(summary(folder / f"{own}_one")["validation_loss"], rel=1e-5)
    assert losses(folder / f"{own}_one")[-1] < losses(folder / f"{own}_one")[0] - 1
    half = [key for key in keys if key != "--training.steps=12"]
    code, _, error = tfdp(
        folder, "train", *half, f"--run_dir={own}_half", "--training.steps=6", "--optimizer.schedule_steps=12"
    )
    assert code == 0, error
    code, _, error = tfdp(folder, "train", f"--run_dir={own}_half", "--training.steps=12")
    assert code == 0, error
    for digest in ("weights_sha256", "state_sha256"):
        assert summary(folder / f"{own}_half")[digest] == summary(folder / f"{own}_one")[digest]
    code, out, error = tfdp(folder, "replay", f"--run_dir={own}_one", "--step=3")
    assert code == 0 and out.count("equal") == 2, out + error
    assert "+" in out if own == "pairs" else "assistant" in out, out  # its examples as text
    code, out, error = tfdp(folder, "evaluate", f"--run_dir={own}_one", "--checkpoint=newest")
    assert code == 0, error
    assert json.loads(out)["validation_loss"] == summary(folder / f"{own}_one")["validation_loss"]


@pytest.mark.slow
def test_shards_of_examples_give_the_run_that_their_records_give(folder: Path) -> None:
    fields = ["--input_field=question", "--target_field=answer", "--tokenizer=bytes", "--validation_fraction=0.1"]
    code, _, error = tfdp(folder, "prepare", "--source=jsonl:pairs.jsonl", *fields, "--output=shards")
    assert code == 0, error
    for name, data in (("records", PAIRS), ("shards", ["--data.source=tokens:shards"])):
        code, _, error = tfdp(folder, "train", *KEYS, *data, *SHORT, f"--run_dir=of_{name}")
        assert code == 0, error
    assert losses(folder / "of_records") == losses(folder / "of_shards")
    evaluated = []
    for name in ("records", "shards"):  # the run on shards knows its template from them
        code, out, error = tfdp(folder, "evaluate", f"--run_dir=of_{name}", "--source=jsonl:pairs.jsonl")
        assert code == 0, error
        evaluated.append((json.loads(out)["validation_loss"], json.loads(out)["num_tokens"]))
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], r"data\.target_field \(null\) must be named, or data\.label_field, or data\.messages_field"),
        ([*PAIRS, "--data.sequences=packed"], r"data\.sequences \(packed\) must be whole or documents"),
        ([*PAIRS, "--data.document_attention=false"], r"data\.document_attention \(False\) must be true"),
        (
            [*PAIRS[:2], "--data.target_field=reply"],
            r"pairs\.jsonl, line 1, must have the field reply: it has question",
        ),
    ],
)
def test_a_mistake_is_one_line_before_tensorflow_loads(
    folder: Path, tmp_path: Path, keys: list[str], message: str
) -> None:
    shutil.copy(folder / "pairs.jsonl", tmp_path)
    assert_refused(without_tensorflow(tmp_path, "tfdp.train", "--run_dir=r", *KEYS, *keys), f".*{message}.*")
    assert not (tmp_path / "r").exists()

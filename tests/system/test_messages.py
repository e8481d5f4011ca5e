"""Values and names in error messages."""

from pathlib import Path

import pytest

from tfdp.config.parsing import known_keys
from tfdp.system.messages import nearest, nearest_key, one_line, shown
from trainers.causal_lm import Config

KEYS = list(known_keys(Config))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (0.02, "0.02"),
        ("", ""),
        ("été", "été"),
        ("a\nb\t\x1b[31m\x07", r"a\nb\t\x1b[31m\x07"),
        ("caf\udce9", r"caf\xe9"),  # a byte that is not UTF-8
        ("\ud800", r"\ud800"),
        ("left\u202eright", r"left\u202eright"),  # text that would turn around what follows
        ("xyz " * 20, "xyz " * 20),
        ("x" * 50 + "y" * 50, "x" * 40 + "..." + "y" * 37),
        ("0123456789abcdef" * 4, "0123456789ab..."),
        (-(10**400), "a negative number of about 401 digits"),
    ],
)
def test_a_value_is_shown_on_one_short_line(value: object, text: str) -> None:
    assert shown(value) == text
    assert len(shown(value)) <= 80
    assert shown(value).isprintable()


def test_a_number_that_python_does_not_write_is_shown() -> None:
    assert shown(10**5000) == "a number of about 5001 digits"


def test_a_path_is_shown_to_be_copied() -> None:
    path = Path("/" + "x" * 150 + "/run.yaml")
    assert shown(path) == str(path)
    assert len(shown(Path("/" + "x" * 3000))) == 200


def test_a_line_stays_one_line() -> None:
    assert one_line("a plain line, été") == "a plain line, été"
    assert one_line("two\nlines\x9b") == r"two\nlines\x9b"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("model.num_layer", "model.num_layers"),
        ("optimzer.name", "optimizer.name"),
        ("modle.num_layers", "model.num_layers"),
        ("learning_rate", "optimizer.learning_rate"),
        ("training.learning_rate", "optimizer.learning_rate"),
        ("tokeniser", "data.tokenizer"),
        ("data.sorce", "data.source"),
        ("run_dri", "run_dir"),
        ("seeed", "seed"),
        ("dropuot", "model.dropout"),
        ("checkpoint.evry_steps", "checkpoint.every_steps"),
        ("batch_size", "training.global_batch_size"),
        ("model.layers", "model.num_layers"),
    ],
)
def test_a_misspelt_key_is_recognised(name: str, key: str) -> None:
    assert nearest_key(name, KEYS) == key


STRANGERS = ["wandb", "training.wandb", "wandb.project", "epochs", "training.epochs", "device", "lr", "gpus"]
STRANGERS += ["output", "size", "verbose", "resume", "qqq", "1", "."]


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_is_taken_for_no_key(name: str) -> None:
    assert nearest_key(name, KEYS) is None


def test_a_name_of_any_length_is_compared_at_once() -> None:
    assert nearest_key("", KEYS) is None
    assert nearest_key("x" * 100_000, KEYS) is None


def test_a_choice_is_recognised_by_a_typing_error_or_two() -> None:
    choices = ["sgd", "adam", "adamw", "momentum", "rmsprop"]
    assert [nearest(word, choices) for word in ("Adam", "adamm", "momentun", "rsmprop")] == [
        "adam",
        "adam",
        "momentum",
        "rmsprop",
    ]
    assert [nearest(word, choices) for word in ("adagrad", "nadam w", "lamb", "s")] == [None] * 4

"""Talks with a model in the terminal: `python -m tfdp.chat --run_dir DIR`. Each line of the input is a turn."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from tfdp.config.parsing import load
from tfdp.config.sections import SamplingConfig
from tfdp.system.exits import ConfigError, run_command
from tfdp.system.messages import shown

if TYPE_CHECKING:
    from tfdp.inference.conversation import Conversation

COMMANDS = {
    "/reset": "forgets the conversation; the system prompt stays",
    "/exit": "ends, as the end of the input does",
    "/help": "lists these; a space before a slash sends it to the model",
}


@dataclass(frozen=True)
class Config(SamplingConfig):
    """The conversation."""

    run_dir: str = "runs/latest"
    """Directory of a run, best one of the recipe instruction, or a folder of Hugging Face, PEFT or KerasHub."""
    checkpoint: str = "best"
    """Which checkpoint: best (by validation loss, or the metric of its task), newest, or a step."""
    system: str | None = None
    """A system prompt: what the model is told before the first turn; null: none."""
    template: str = "auto"
    """How messages become one text: chatml, tokenizer (the chat template of its folder), or a text with {content} for
    each role, in JSON; auto: what the run was trained with (data.template, or that of its shards), for a folder
    that of its tokenizer, else chatml."""


def main() -> None:
    description = "Talk with a model: each line of the input is a turn, /help lists what else there is."
    config = load(Config, sys.argv[1:], "python -m tfdp.chat", description)
    from tfdp import api

    conversation = api.load(config.run_dir, config.checkpoint).chat(config.system, config.template)
    sampling: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(SamplingConfig)}
    try:
        for line in _lines():
            text = line.strip()
            if line.startswith("/"):
                if text == "/exit":
                    return
                _obey(text, conversation)
            elif text:
                _answer(conversation, text, sampling)
    except KeyboardInterrupt:  # at the prompt
        print()


def _lines() -> Iterator[str]:
    """The lines of the input until it ends."""
    prompt = "> " if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty() else ""
    if prompt:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  it edits and remembers the lines of `input`
    while sys.stdin is not None:  # it may be closed
        try:
            yield input(prompt)
        except EOFError:
            if prompt:
                print()
            return
        except UnicodeDecodeError as error:
            raise ConfigError(f"the input must be text in UTF-8: {error.reason}") from None


def _obey(text: str, conversation: "Conversation") -> None:
    """What begins with a slash; its answers go to stderr, so that stdout holds those of the model alone."""
    if text == "/reset":
        conversation.reset()
    elif text == "/help":
        for name, meaning in COMMANDS.items():
            print(f"{name:<8} {meaning}", file=sys.stderr)
    else:
        print(f"note: {shown(text.split(maxsplit=1)[0])} is none of {', '.join(COMMANDS)}: not sent", file=sys.stderr)


def _answer(conversation: "Conversation", text: str, sampling: dict[str, Any]) -> None:
    num_forgotten, num_messages = conversation.num_forgotten, len(conversation.messages)
    with _interrupts() as is_interrupted:
        try:
            pieces = conversation.stream(text, **sampling)
        except ConfigError as error:  # of this turn
            print(f"error: {error}", file=sys.stderr)
            return
        num_new = conversation.num_forgotten - num_forgotten
        if num_new:
            print(f"note: turns forgotten, to fit into the context: {num_new}", file=sys.stderr)
        with contextlib.closing(pieces):
            for piece in pieces:
                print(piece, end="", flush=True)
                if is_interrupted.is_set():
                    break
        print(flush=True)
    if len(conversation.messages) == num_messages - 2 * num_new:
        print("note: the answer is empty, so the turn is not kept", file=sys.stderr)


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C as an event, while the model answers: it ends the answer between two tokens, so none is lost.

    At the prompt it raises, as ever.
    """
    event, before = threading.Event(), signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:  # by nohup, or as a job in the background
        yield event
        return
    signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))

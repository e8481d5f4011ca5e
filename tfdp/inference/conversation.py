"""A conversation with a model: the turns so far, the prompt that they make, and the answer to the next one."""

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from tfdp.config.sections import SamplingConfig
from tfdp.data.chat import ChatTemplate, Message
from tfdp.data.encoding import example_ids
from tfdp.data.examples import BEGIN, Conversations, plain
from tfdp.data.tokenizers.tokenizer import Tokenizer, markup_ids
from tfdp.inference.keys import sampling_of
from tfdp.system.exits import ConfigError, require
from tfdp.tasks.flags import ID_MASK

PLACE = "the conversation"  # in messages

Continued = Callable[[Sequence[int], SamplingConfig, Collection[int]], Iterator[str]]


class Conversation:
    """Turns of a user and the answers of a model; `LanguageModel.chat` makes one.

    A turn sees as much of the conversation as fits into the context beside `num_tokens` of answer, at least half of the
    context: the oldest turns are forgotten first, the system prompt stays.

    Args:
      continued: yields the text that follows ids, up to one of the ids that end it: `Sampler.stream_after`.
      tokenizer: of the model.
      template: how messages become a text.
      context_length: the most tokens that the model looks back on.
      of_run: whether the model is a run of tfdp, which saw documents that begin with an end of text.
      system: a system prompt.

    Attributes:
      num_forgotten: turns that have left the context since the beginning, or the last `reset`.

    Raises:
      ConfigError: the template refuses the system prompt.
    """

    def __init__(
        self,
        continued: Continued,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        context_length: int,
        of_run: bool,
        system: str | None = None,
    ) -> None:
        self._continued, self._tokenizer, self._template = continued, tokenizer, template
        self._context_length, self._of_run = context_length, of_run
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": plain(system, "system")}]
        self._end_id, self._end_text = self._end_of_turn()
        self._turns: list[tuple[str, str]] = []  # what was said, and answered
        self.num_forgotten = 0

    @property
    def messages(self) -> list[Message]:
        """What the model has in view: the system prompt, and the turns that are not forgotten."""
        return self._messages(self._turns)

    def reset(self) -> None:
        """Forgets all turns; the system prompt stays."""
        self._turns, self.num_forgotten = [], 0

    def say(self, text: str, **sampling: Any) -> str:
        """The answer to a turn of the user; see `stream`."""
        return "".join(self.stream(text, **sampling))

    def stream(self, text: str, **sampling: Any) -> Generator[str, None, None]:
        """The pieces of the answer to a turn of the user, as they come.

        The turn belongs to the conversation once its answer has ended; one that is closed early has what came until
        then for its answer. A turn without an answer is dropped: no template writes one.

        Args:
          text: what the user says.
          **sampling: the keys of `SamplingConfig`; `stop` in addition to the end of a turn.

        Raises:
          ConfigError: the turn does not fit into the context, or a key is wrong; the conversation is as it was.
        """
        require(bool(text.strip()), "text", text, "must not be empty")
        config = sampling_of(sampling)
        if self._end_text is not None:
            config = replace(config, stop=(*config.stop, self._end_text))
        ids, num_left = self._fitting_ids(text, config.num_tokens)
        self.num_forgotten += num_left
        self._turns = self._turns[num_left:]
        return self._answer(text, self._continued(ids, config, () if self._end_id is None else (self._end_id,)))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the model answers, after these messages.

        For a run they are those of the document of this conversation in training, part for part. For a folder of
        another library they are those of the whole text, as transformers makes them.
        """
        start = [self._tokenizer.end_of_text]
        if not self._of_run:
            return markup_ids(self._tokenizer, self._template.render(messages, True, PLACE)).tolist() or start
        text = Conversations("", self._template).prompt(messages, PLACE)
        return start + (example_ids(self._tokenizer, text) & ID_MASK).tolist() if text else start

    def _answer(self, text: str, pieces: Iterator[str]) -> Generator[str, None, None]:
        answer = ""
        try:
            for piece in pieces:
                answer += piece
                yield piece
        finally:  # also where the reader wants no more
            if answer.strip():
                self._turns.append((text, answer))

    def _fitting_ids(self, text: str, num_tokens: int) -> tuple[list[int], int]:
        """The ids of the next prompt, and how many of the oldest turns had to go for them."""
        room = max(self._context_length - num_tokens, self._context_length // 2)
        for num_left in range(len(self._turns) + 1):
            ids = self.prompt_ids([*self._messages(self._turns[num_left:]), {"role": "user", "content": text}])
            if len(ids) <= room:
                return ids, num_left
        rule = f"must fit into {room} of the {self._context_length} tokens of the context, and takes {len(ids)}"
        fix = "shorten it" if room == self._context_length - 1 else "shorten it, or lower num_tokens"
        raise ConfigError(f"this turn {rule} with all that stands around it: {fix}")

    def _messages(self, turns: Sequence[tuple[str, str]]) -> list[Message]:
        said = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        return [*self._system, *said]

    def _end_of_turn(self) -> tuple[int | None, str | None]:
        """What the template writes after an answer: a special token, or else a text; both None where it is nothing.

        An end of text ends an answer in any case.
        """
        mark = BEGIN  # as the answer: a character that no template has
        end = self._template.render(self._messages([("?", mark)]), False, PLACE).rpartition(mark)[2].strip()
        if not end:
            return None, None
        first = int(markup_ids(self._tokenizer, end)[0])
        return (None, end) if self._tokenizer.token_bytes[first] else (first, None)

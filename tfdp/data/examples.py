"""Examples: records, several fields of which become one document, a part of which is learned.

A document of an example is a text with marks: what stands between `BEGIN` and `END` is learned, and the rest is only
seen. The marks are two of the code points that Unicode keeps for such inner uses of a program (noncharacters, section
23.7 of the standard). So all that is done with documents (digests, held-out parts, duplicates, parts of preparations)
is done with examples.

    data.input_field, data.target_field     a pair: question and answer, text and translation
    data.input_field, data.label_field      a text and its class
    data.messages_field                     a conversation: [{"role": "user", "content": "..."}, ...]
"""

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from tfdp.data import records, strict_json
from tfdp.data.chat import ROLES, ChatTemplate, Message, chat_template
from tfdp.data.tokenizers.tokenizer import make_tokenizer, size_to_train
from tfdp.system.exits import ConfigError, require
from tfdp.system.messages import shown
from tfdp.system.sealed import read_sealed, write_sealed

BEGIN, END = "\ufdd0", "\ufdd1"  # of what is learned
DEFAULT_TEMPLATES = {"target": "{input}\n{target}", "label": "{input}\n{label}"}


@dataclass(frozen=True)
class ExampleKeys:
    """The keys of section `data` that say how records become examples."""

    template: str = "auto"
    input_field: str | None = None
    target_field: str | None = None
    label_field: str | None = None
    messages_field: str | None = None

    @classmethod
    def of(cls, config: Any) -> "ExampleKeys":
        """Those among the keys of a configuration."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @property
    def makes_examples(self) -> bool:
        return self.messages_field is not None or self.answer is not None

    @property
    def answer(self) -> str | None:
        """What is learned of a pair: "target" or "label"."""
        return "target" if self.target_field is not None else "label" if self.label_field is not None else None


def save_keys(path: Path, ways: Sequence[ExampleKeys]) -> None:
    """Writes down how records became examples, so that a model can be asked as it was trained."""
    write_sealed(path, {"examples": [asdict(each) for each in ways]})


def open_keys(path: Path, key: str) -> list[ExampleKeys]:
    """What `save_keys` wrote; nothing where there is no such file.

    Raises:
      ConfigError: it is not what was written.
    """
    try:
        return [ExampleKeys(**each) for each in read_sealed(path)["examples"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{key} ({path}) must be as the run wrote it: {error}") from None


class Form(Protocol):
    """How a record becomes a document with marks."""

    @property
    def fields(self) -> Sequence[str]:
        """Those of the record, in the order in which `text` takes their values."""
        ...

    @property
    def fingerprint(self) -> str:
        """Differs between forms that make other documents."""
        ...

    def text(self, values: Sequence[Any], where: str) -> str:
        """The document. Raises `ConfigError` "`where` FIELD must ..." for a value that is none."""
        ...


@dataclass(frozen=True)
class OneField:
    """A field that is the text: a document without marks."""

    field: str

    @property
    def fields(self) -> list[str]:
        return [self.field]

    @property
    def fingerprint(self) -> str:
        return self.field

    def text(self, values: Sequence[Any], where: str) -> str:
        return records.text_of(values[0], f"{where} {shown(self.field)}")


@dataclass(frozen=True)
class Pairs:
    """An input and what follows from it, in a template: a format string without attributes, indices and conversions.

    Attributes:
      pieces: of the template: (text before a field, the field); the last field is None.
      answer: the field that is learned, with all that stands behind it.
      as_label: whether its value is a class: a number or a truth value as JSON writes it, or a text.
    """

    pieces: Sequence[tuple[str, str | None]]
    answer: str
    as_label: bool

    @property
    def fields(self) -> list[str]:
        return list(dict.fromkeys(field for _, field in self.pieces if field is not None))

    @property
    def fingerprint(self) -> str:
        return json.dumps([self.pieces, self.answer, self.as_label])

    def text(self, values: Sequence[Any], where: str) -> str:
        texts = {field: self._text_of(field, value, where) for field, value in zip(self.fields, values, strict=True)}
        if not texts[self.answer].strip():
            raise ConfigError(f"{where} {shown(self.answer)} must not be empty: it is what is learned")
        return self._filled(texts)

    def prompt(self, values: Mapping[str, Any], where: str) -> str:
        """What a model is given to continue, all before the answer: of the other fields by name."""
        texts = {field: self._text_of(field, value, where) for field, value in values.items()}
        return self._filled({**texts, self.answer: ""}).partition(BEGIN)[0]

    def _filled(self, texts: dict[str, str]) -> str:
        made = ""
        for before, field in self.pieces:
            made += before + (BEGIN if field == self.answer else "") + (texts[field] if field is not None else "")
        return made + END

    def _text_of(self, field: str, value: Any, where: str) -> str:
        is_class = self.as_label and field == self.answer and not isinstance(value, str)
        place = f"{where} {shown(field)}"
        return plain(records.compared(value, place) if is_class else records.text_of(value, place), place)


@dataclass(frozen=True)
class Conversations:
    """Messages in turn, as a chat template writes them; what the assistant says is learned, each turn with its end."""

    field: str
    template: ChatTemplate

    @property
    def fields(self) -> list[str]:
        return [self.field]

    @property
    def fingerprint(self) -> str:
        return json.dumps([self.field, self.template.fingerprint])

    def text(self, values: Sequence[Any], where: str) -> str:
        place = f"{where} {shown(self.field)}"
        messages = messages_of(values[0], place)
        made = self._marked(messages, place)
        if BEGIN not in made:
            raise ConfigError(f"{place} must have a message of the assistant: that is what is learned")
        return made.rstrip() if messages[-1]["role"] == "assistant" else made

    def prompt(self, messages: Sequence[Message], place: str) -> str:
        """What a model is given to answer: all that the document of this conversation has before the next answer."""
        answered = messages_of([*messages, {"role": "assistant", "content": "."}], place)
        return self._marked(answered, place).rpartition(BEGIN)[0]

    def _marked(self, messages: Sequence[Message], place: str) -> str:
        """The messages up to the last one of the assistant."""
        done, made = "", ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.template.render(messages[:index], True, place)
            after = self.template.render(messages[: index + 1], False, place)
            if not (before.startswith(done) and after.startswith(before)):
                rule = "must write the first turns of a conversation as it does without the later ones"
                raise ConfigError(f"{place}: the chat template of the tokenizer {rule}: try data.template chatml")
            answer = after[len(before) :]
            kept = answer.rstrip()  # what follows the end of a turn is no part of it
            made += f"{before[len(done) :]}{BEGIN}{kept}{END}{answer[len(kept) :]}"
            done = after
        return made


def messages_of(value: Any, where: str) -> list[Message]:
    """The messages of a field, checked; a text is read as JSON. Raises `ConfigError` "`where` must ..."."""
    if isinstance(value, str):
        try:
            value = strict_json.parse(value.encode())
        except ValueError as error:
            raise ConfigError(f"{where} must be a list of messages: {error}") from None
    if not isinstance(value, list) or not value:
        raise ConfigError(f'{where} must be a list of messages, {{"role": "user", "content": "..."}}')
    found: list[Message] = []
    for number, message in enumerate(value, 1):
        place = f"{where}, message {number},"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ConfigError(f"{place} must have a role and a content")
        role = message["role"]
        if role not in ROLES:
            raise ConfigError(f"{place} role ({shown(role)}) must be one of {', '.join(ROLES)}")
        content = plain(records.text_of(message["content"], f"{place} content"), f"{place} content")
        if role == "assistant" and not content.strip():
            raise ConfigError(f"{place} content must not be empty: it is what is learned")
        found.append({"role": str(role), "content": content})
    return found


def make_form(keys: ExampleKeys, tokenizer: str, section: str) -> Form | None:
    """The form that the keys ask for; None where they ask for plain text.

    Args:
      tokenizer: its name, for the chat template that it may have.
      section: of the configuration, with its dot, to name what is wrong.

    Raises:
      ConfigError: keys that do not go together.
    """
    if not keys.makes_examples:
        rule = "needs data.target_field, data.label_field or data.messages_field: what is learned"
        require(keys.input_field is None, f"{section}input_field", keys.input_field, rule)
        require(keys.template == "auto", f"{section}template", keys.template, rule)
        return None
    if keys.messages_field is not None:
        for name in ("input_field", "target_field", "label_field"):
            value = getattr(keys, name)
            require(value is None, f"{section}{name}", value, f"must be null with {section}messages_field")
        own = None if size_to_train(tokenizer) is not None else make_tokenizer(tokenizer, f"{section}tokenizer")
        return Conversations(keys.messages_field, chat_template(keys.template, own, f"{section}template"))
    both = keys.target_field is None or keys.label_field is None
    require(both, f"{section}label_field", keys.label_field, f"must be null with {section}target_field")
    return _pairs(keys, section)


def _pairs(keys: ExampleKeys, section: str) -> Pairs:
    kind = str(keys.answer)
    answer = str(keys.target_field or keys.label_field)
    own = {"input": keys.input_field, kind: answer}
    template = DEFAULT_TEMPLATES[kind] if keys.template == "auto" else keys.template
    where, pieces = f"{section}template", []
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{where} ({shown(template)}) must be a format string: {error}") from None
    for before, name, spec, conversion in parsed:
        is_plain = name != "" and not spec and conversion is None
        require(is_plain, where, template, "must have plain fields alone, such as {input}: double a brace to mean it")
        field = own.get(name, name) if name is not None else None
        rule = f"needs {section}input_field: the field that {{input}} stands for"
        require(name != "input" or field is not None, where, template, rule)
        pieces.append((plain(before, where), field))
    count = sum(field == answer for _, field in pieces)
    require(count == 1, where, template, f"must have {{{kind}}} once: what is learned")
    return Pairs(tuple(pieces), answer, kind == "label")


def plain(text: str, where: str) -> str:
    """The text. Raises `ConfigError` where it holds a mark."""
    for mark in (BEGIN, END):
        if mark in text:
            raise ConfigError(f"{where} must not hold U+{ord(mark):04X}, no character of any text: remove it")
    return text


def unmarked(text: str) -> str:
    """A document without its marks."""
    return text.replace(BEGIN, "").replace(END, "")


def split(text: str) -> list[tuple[str, bool]]:
    """The parts of a document with marks in order, each with whether it is learned; none is empty."""
    found = []
    for part in text.split(BEGIN):
        learned, end, seen = part.partition(END)
        found += [(learned, True), (seen, False)] if end else [(learned, False)]
    return [(part, is_learned) for part, is_learned in found if part]

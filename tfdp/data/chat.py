"""Chat templates: how the messages of a conversation become one text.

    chatml                  <|im_start|>ROLE, the content, <|im_end|>, each turn on lines of its own (OpenAI's ChatML)
    tokenizer               that of the tokenizer's folder: a Jinja template, as transformers runs it
    {"user": "...", ...}    a text for each role, in JSON, in which {content} stands for what is said

Templates of a folder run in Jinja's sandbox: they reach neither files nor Python.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from tfdp.data import strict_json
from tfdp.data.tokenizers.hugging_face import HuggingFaceTokenizer
from tfdp.data.tokenizers.tokenizer import Tokenizer
from tfdp.system.exits import ConfigError, require
from tfdp.system.messages import one_line

ROLES = ("system", "user", "assistant")
Message = dict[str, str]  # role and content


class ChatTemplate(Protocol):
    """How messages become a text."""

    @property
    def fingerprint(self) -> str:
        """Differs between templates that write other texts."""
        ...

    def render(self, messages: Sequence[Message], starts_answer: bool, where: str) -> str:
        """The text of messages; with `starts_answer`, what the assistant goes on from stands at its end.

        Raises:
          ConfigError: the template refuses these messages; the message begins with `where`.
        """
        ...


@dataclass(frozen=True)
class RoleTemplates:
    """A text for each role; what stands before {content} in that of the assistant starts its answer."""

    texts: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        return json.dumps(dict(self.texts), sort_keys=True)

    def render(self, messages: Sequence[Message], starts_answer: bool, where: str) -> str:
        made = ""
        for message in messages:
            if message["role"] not in self.texts:
                raise ConfigError(f"{where}: data.template must have a text for the role {message['role']}")
            before, _, after = self.texts[message["role"]].partition("{content}")
            made += before + message["content"] + after
        return made + (self.texts["assistant"].partition("{content}")[0] if starts_answer else "")


CHATML = RoleTemplates({role: f"<|im_start|>{role}\n{{content}}<|im_end|>\n" for role in ROLES})


@dataclass(frozen=True)
class JinjaTemplate:
    """The chat template of a Hugging Face folder.

    Attributes:
      source: of the template.
      special_tokens: by name, such as bos_token, which it may use.
    """

    source: str
    special_tokens: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        told = json.dumps([self.source, dict(self.special_tokens)], sort_keys=True)
        return f"jinja-{hashlib.sha256(told.encode()).hexdigest()[:16]}"

    def render(self, messages: Sequence[Message], starts_answer: bool, where: str) -> str:
        try:
            return str(
                _compiled(self.source).render(
                    messages=list(messages), add_generation_prompt=starts_answer, tools=None, **self.special_tokens
                )
            )
        except Exception as error:  # whatever a template raises
            reason = one_line(str(error))
            raise ConfigError(f"{where}: the chat template of the tokenizer refuses it: {reason}") from None


@lru_cache(maxsize=4)
def _compiled(source: str) -> Any:
    """A template in the environment that transformers gives it, but for `strftime_now`.

    A template that may ask for the date has another text where it cannot, and the same one on each day.
    """
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)


def chat_template(name: str, tokenizer: Tokenizer | None, key: str) -> ChatTemplate:
    """The template that `data.template` names.

    Args:
      name: "auto": that of the tokenizer if it has one, else ChatML.
      tokenizer: None where one is still to be trained.
      key: the configuration key to blame.

    Raises:
      ConfigError: there is no such template.
    """
    own = _own_template(tokenizer) if tokenizer is not None else None
    if name in ("auto", "tokenizer"):
        require(name == "auto" or own is not None, key, name, "needs a tokenizer with a chat template: try chatml")
        return own or CHATML
    if name == "chatml":
        return CHATML
    rule = "must be auto, chatml, tokenizer, or a text for each role in JSON: "
    rule += '{"user": "Q: {content}\\n", "assistant": "A: {content}\\n"}'
    try:
        texts: Any = strict_json.parse(name.encode())
    except ValueError:
        texts = None
    is_table = isinstance(texts, dict) and {"user", "assistant"} <= texts.keys() <= set(ROLES)
    is_whole = is_table and all(isinstance(text, str) and text.count("{content}") == 1 for text in texts.values())
    require(is_whole, key, name, rule)
    return RoleTemplates(texts)


def _own_template(tokenizer: Tokenizer) -> JinjaTemplate | None:
    """The template among the files of a tokenizer of Hugging Face."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    try:
        names: Any = strict_json.parse(tokenizer.files.get("tokenizer_config.json", b"{}"))
        source = names.get("chat_template")
        if isinstance(source, list):  # several by name
            source = next((each["template"] for each in source if each["name"] == "default"), None)
        if "chat_template.jinja" in tokenizer.files:
            source = tokenizer.files["chat_template.jinja"].decode()
        tokens = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in names.items()
            if name.endswith("_token") and isinstance(value, dict | str)
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"the chat template of the tokenizer must be readable: {one_line(str(error))}") from None
    return JinjaTemplate(source, tokens) if isinstance(source, str) else None

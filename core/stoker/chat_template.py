"""A conversation to prompt tokens: the model's own Jinja template, and user text that stays text.

A model file is untrusted input, so its template runs in Jinja's sandbox. What a user types is untrusted
too: ``<|im_start|>`` in a message must not open a turn. Each control token's text that occurs inside a
message is marked before rendering; afterwards only unmarked ones, which the template itself wrote, become
control tokens.
"""

from __future__ import annotations

import datetime
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import meta

from stoker.errors import InvalidRequestError, ModelError
from stoker.interfaces import Tokenizer
from stoker.template_meter import FULL, METER, QUICK, Allowance, Meter, TemplateLimitError
from stoker.template_sandbox import MeteredEnvironment

__all__ = ["ChatTemplate", "RenderedPrompt"]

# For models whose file brings no template: the form that their vocabulary was made for.
_BY_CONTROL_TOKEN = {
    "<|im_start|>": (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "<start_of_turn>": (
        "{{ bos_token }}{% set system = namespace(text='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set system.text = m.content + '\n\n' %}{% else %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ system.text }}{{ m.content }}<end_of_turn>\n{% set system.text = '' %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "<|start_header_id|>": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
}
_PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


_TAIL_CHARS = 100
_MAX_SOURCE = 1_000_000
_EFFORT = frozenset({"reasoning_effort", "enable_thinking"})
_NOTHING = (None, False, "", "none", "minimal")
_MAX_SHOWN = 8
_RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message")


class _TemplateRefusedError(Exception):
    """The template itself called ``raise_exception``."""


def _raise_exception(message: str) -> None:
    raise _TemplateRefusedError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face's transformers has it."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100 or re.search(r"%[^A-Za-z%]", pattern):
        raise ValueError("strftime_now: a short pattern without widths is expected")
    return datetime.datetime.now().astimezone().strftime(pattern)


def _usual_form(tokenizer: Tokenizer) -> str:
    known = tokenizer.special_tokens
    return next((form for token, form in _BY_CONTROL_TOKEN.items() if token in known), _PLAIN)


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A conversation as a model gets it.

    Attributes:
        token_ids: Its tokens.
        tail: How its text ends; control tokens in it that nobody but the template wrote are whole.
    """

    token_ids: list[int]
    tail: str


class ChatTemplate:
    """One model's template, compiled once.

    Args:
        source: The Jinja source; ``None`` for the usual form of the tokenizer's family (ChatML, Gemma,
            Llama 3), or a plain "User: ... Assistant:" for a vocabulary without turns.
        tokenizer: The model's tokenizer.
        bos_token: What ``bos_token`` stands for in the template.
        eos_token: What ``eos_token`` stands for in the template.

    Attributes:
        knows_tools: Whether the template itself writes tools and calls.

    Raises:
        ModelError: The template does not compile.
    """

    def __init__(
        self, source: str | None, tokenizer: Tokenizer, *, bos_token: str = "", eos_token: str = ""
    ) -> None:
        environment = MeteredEnvironment()
        environment.add_filter("tojson", _to_json)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        text = _usual_form(tokenizer) if source is None else source
        if len(text) > _MAX_SOURCE:
            raise ModelError(
                f"the model's chat template has {len(text):,} characters; at most {_MAX_SOURCE:,} are read"
            )
        try:
            self._asks_for = meta.find_undeclared_variables(environment.parse(text))
            self._template = environment.from_string(text)
        except (jinja2.TemplateError, SyntaxError, ValueError, OverflowError) as error:
            raise ModelError(f"the model's chat template does not compile: {error}") from error
        except (RecursionError, MemoryError) as error:
            raise ModelError("the model's chat template is nested too deeply") from error
        self.knows_tools = "tools" in self._asks_for
        self._tokenizer = tokenizer
        self._names = {"bos_token": bos_token, "eos_token": eos_token}
        special = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None
        # Nobody who does not know it can type it, no template splits or strips on it, and no filter that
        # changes letters changes it.
        secret = f"{secrets.randbits(48):015}"
        self._mark = f"\ufdd0{secret}\ufdd1"
        self._end_mark = f"\ufdd2{secret}\ufdd1"

    @cached_property
    def takes_system(self) -> bool:
        """Whether a conversation may begin with a system message."""
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        try:
            self._render(messages, allowance=QUICK)
        except InvalidRequestError:
            return False
        except TemplateLimitError:
            return True
        return True

    def unheard(self, options: Mapping[str, Any]) -> list[str]:
        """The options that have no effect, in words: the template does not ask for them.

        Those that ask for nothing, such as ``enable_thinking: false``, are left out.
        """
        names = [
            name
            for name, value in options.items()
            if name not in self._asks_for and value not in _NOTHING
        ]
        if (
            options.keys() >= _EFFORT
        ):  # one field of a request sets both; templates ask for one of them
            spare = _EFFORT if _EFFORT & self._asks_for else {"enable_thinking"}
            names = [name for name in names if name not in spare]
        shown = [
            f"{name[:64]!a} has no effect: this model's template does not ask for it"
            for name in names[:_MAX_SHOWN]
        ]
        more = len(names) - len(shown)
        return [*shown, f"and {more} more"] if more else shown

    def render(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> str:
        """The prompt as text, for people: what a user typed is not told from what the template wrote.

        Args:
            messages: The conversation.
            settings: As for ``prompt``.
        """
        return self._render(messages, **settings).replace(self._mark, "")

    def encode(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> list[int]:
        """The prompt as token ids; see ``prompt``."""
        return self.prompt(messages, **settings).token_ids

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        allowance: Allowance = FULL,
    ) -> RenderedPrompt:
        """The prompt that a conversation is.

        Args:
            messages: The conversation.
            tools: Functions that the model may call, in OpenAI's shape, for templates that know tools.
            options: More names for the template (``chat_template_kwargs``): ``documents``,
                ``enable_thinking``, ...
            add_generation_prompt: Whether it ends with the beginning of an assistant's message.
            continue_final_message: Whether it ends within the last message, an assistant's; not with
                ``add_generation_prompt``.
            allowance: What the template may do: ``QUICK`` on an event loop's thread, else ``FULL``.

        Raises:
            InvalidRequestError: The template refuses these messages, or fails on them, or does more than
                any may, or the settings contradict each other.
            TemplateLimitError: It does more than it may do quickly.
        """
        marked = self._render(
            [self._mark_message(message) for message in messages],
            tools=self._mark_strings(tools),
            options=self._mark_strings(options or {}),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            allowance=allowance,
        )
        return RenderedPrompt(self._encode(marked), marked[-_TAIL_CHARS:])

    def _encode(self, marked: str) -> list[int]:
        if self._mark not in marked:
            return self._encode_trusted(marked)
        tokens: list[int] = []
        at = 0
        for match in self._special.finditer(marked) if self._special else ():
            tokens += self._encode_text(marked[at : match.start()])
            tokens.append(self._tokenizer.special_tokens[match.group()])
            at = match.end()
        return tokens + self._encode_text(marked[at:])

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Any = None,
        options: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        allowance: Allowance = FULL,
    ) -> str:
        names = self._checked(options or {})
        if continue_final_message:
            messages = self._open_ended(messages, add_generation_prompt=add_generation_prompt)
        names |= {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._written(names, allowance)
        return self._cut(text) if continue_final_message else text

    def _written(self, names: dict[str, Any], allowance: Allowance) -> str:
        token = None
        try:
            token = METER.set(Meter(allowance, [names["messages"], names["tools"]]))
            return self._template.render(names)
        except TemplateLimitError as error:
            if allowance is not FULL:
                raise
            raise InvalidRequestError(
                f"the model's chat template does more than a template may: {error}",
                param="messages",
            ) from None
        except RecursionError:
            raise InvalidRequestError(
                "the model's chat template, or what it is given, is nested too deeply",
                param="messages",
            ) from None
        except _TemplateRefusedError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {str(error)[:500]}",
                param="messages",
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidRequestError(
                f"the model's chat template fails on these messages: {str(error)[:500]}",
                param="messages",
            ) from error
        finally:
            if token is not None:
                METER.reset(token)

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All further names that the template gets.

        Raises:
            InvalidRequestError: The request may not set one of them.
        """
        for name in options:
            if name in _RESERVED or name in self._template.globals:
                raise InvalidRequestError(
                    f"'chat_template_kwargs' may not set {name[:50]!r}",
                    param="chat_template_kwargs",
                )
        return {**self._names, **options}

    def _open_ended(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
    ) -> list[Mapping[str, Any]]:
        """The messages with a mark where the last one's text ends, as Hugging Face's transformers does."""
        if add_generation_prompt:
            raise InvalidRequestError(
                "'continue_final_message' and 'add_generation_prompt' contradict each other: the answer "
                "either goes on in the last message or begins a new one; set one of them to false",
                param="continue_final_message",
            )
        last = messages[-1] if messages else {}
        if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
            raise InvalidRequestError(
                "'continue_final_message' needs a last message of the role assistant with text to go on "
                "from",
                param="continue_final_message",
            )
        return [*messages[:-1], {**last, "content": f"{last['content']}{self._end_mark}"}]

    def _cut(self, text: str) -> str:
        at = text.rfind(self._end_mark)
        if at < 0:
            raise InvalidRequestError(
                "the model's chat template does not write the last message as it is, so that "
                "'continue_final_message' cannot go on from it",
                param="continue_final_message",
            )
        return text[:at].replace(self._end_mark, "")

    def _mark_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Mark all strings but the role, which is one of a few."""
        return {
            name: value if name == "role" else self._mark_strings(value)
            for name, value in message.items()
        }

    def _mark_strings(self, value: Any) -> Any:
        """Put the mark inside every control token's text, also in the names of properties."""
        if isinstance(value, str):
            if self._special is None:
                return value
            return self._special.sub(lambda m: m.group()[:1] + self._mark + m.group()[1:], value)
        if isinstance(value, Mapping):
            return {
                self._mark_strings(name): self._mark_strings(item) for name, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._mark_strings(item) for item in value]
        return value

    def _encode_trusted(self, text: str) -> list[int]:
        """Text without marks: every control token in it was written by the template."""
        return self._tokenizer.encode(text, add_special=False, parse_special=True)

    def _encode_text(self, marked: str) -> list[int]:
        """Text in which no control token may be parsed.

        Where a tokenizer turns a markup token into itself even so ("user defined" tokens), the text is
        cut at the mark: two halves cannot make the token.
        """
        if not marked:
            return []
        special_ids = self._tokenizer.special_tokens.values()
        text = marked.replace(self._mark, "")
        tokens = self._tokenizer.encode(text, add_special=False, parse_special=False)
        if self._mark not in marked or set(tokens).isdisjoint(special_ids):
            return tokens
        return [
            token
            for part in marked.split(self._mark)
            if part
            for token in self._tokenizer.encode(part, add_special=False, parse_special=False)
        ]

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
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stoker.errors import InvalidRequestError, ModelError
from stoker.interfaces import Tokenizer

__all__ = ["ChatTemplate"]

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


class _TemplateRefusedError(Exception):
    """The template itself called ``raise_exception``."""


def _raise_exception(message: str) -> None:
    raise _TemplateRefusedError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)


def _usual_form(tokenizer: Tokenizer) -> str:
    known = tokenizer.special_tokens
    return next((form for token, form in _BY_CONTROL_TOKEN.items() if token in known), _PLAIN)


class ChatTemplate:
    """One model's template, compiled once.

    Args:
        source: The Jinja source; ``None`` for the usual form of the tokenizer's family (ChatML, Gemma,
            Llama 3), or a plain "User: ... Assistant:" for a vocabulary without turns.
        tokenizer: The model's tokenizer.
        bos_token: What ``bos_token`` stands for in the template.
        eos_token: What ``eos_token`` stands for in the template.

    Raises:
        ModelError: The template does not compile.
    """

    def __init__(
        self, source: str | None, tokenizer: Tokenizer, *, bos_token: str = "", eos_token: str = ""
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(
                _usual_form(tokenizer) if source is None else source
            )
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template does not compile: {error}") from error
        self._tokenizer = tokenizer
        self._names = {"bos_token": bos_token, "eos_token": eos_token}
        special = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None
        # Nobody who does not know it can type it, and no template splits or strips on it.
        self._mark = f"\ufdd0{secrets.token_hex(4)}\ufdd1"

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt as text, for people: what a user typed is not told from what the template wrote."""
        return self._render(messages).replace(self._mark, "")

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt as token ids.

        Raises:
            InvalidRequestError: The template refuses these messages, or fails on them.
        """
        marked = self._render([self._mark_strings(message) for message in messages])
        if self._mark not in marked:
            return self._encode_trusted(marked)
        tokens: list[int] = []
        at = 0
        for match in self._special.finditer(marked) if self._special else ():
            tokens += self._encode_text(marked[at : match.start()])
            tokens.append(self._tokenizer.special_tokens[match.group()])
            at = match.end()
        return tokens + self._encode_text(marked[at:])

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, **self._names
            )
        except _TemplateRefusedError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidRequestError(
                f"the model's chat template fails on these messages: {error}", param="messages"
            ) from error

    def _mark_strings(self, value: Any, key: str = "") -> Any:
        """Put the mark inside every control token's text, in all strings but the validated role."""
        if isinstance(value, str):
            if self._special is None or key == "role":
                return value
            return self._special.sub(lambda m: m.group()[:1] + self._mark + m.group()[1:], value)
        if isinstance(value, Mapping):
            return {name: self._mark_strings(item, name) for name, item in value.items()}
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

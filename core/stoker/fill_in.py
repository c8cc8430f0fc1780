"""Prompts with a gap: what comes before and after it, between the tokens that a model knows for that."""

from __future__ import annotations

from typing import NamedTuple

from stoker.errors import InvalidRequestError
from stoker.interfaces import Tokenizer

__all__ = ["fill_in_prompt"]


class _FillInForm(NamedTuple):
    """How a family of models is told of a gap: its control tokens among ``prefix`` and ``suffix``."""

    order: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [part for part in self.order if part not in {"prefix", "suffix"}]


_DEEPSEEK = "<\uff5cfim\u2581{}\uff5c>"
_FILL_IN = (
    _FillInForm(("<|fim_prefix|>", "prefix", "<|fim_suffix|>", "suffix", "<|fim_middle|>")),
    _FillInForm(("<fim_prefix>", "prefix", "<fim_suffix>", "suffix", "<fim_middle>")),
    _FillInForm(
        (
            "<\uff5cfim\u2581begin\uff5c>",
            "prefix",
            "<\uff5cfim\u2581hole\uff5c>",
            "suffix",
            "<\uff5cfim\u2581end\uff5c>",
        )
    ),
    _FillInForm(("\u2581<PRE>", "prefix", "\u2581<SUF>", "suffix", "\u2581<MID>")),
    _FillInForm(("[SUFFIX]", "suffix", "[PREFIX]", "prefix")),
)


def fill_in_prompt(tokenizer: Tokenizer, prompt: str | list[int], suffix: str) -> list[int]:
    """The prompt of an output that is to stand between ``prompt`` and ``suffix``.

    Raises:
        InvalidRequestError: The model has no tokens for that.
    """
    known = tokenizer.special_tokens
    forms = [form for form in _FILL_IN if all(name in known for name in form.names)]
    if not forms:
        raise InvalidRequestError(
            "this model has no tokens for filling a gap; leave 'suffix' out", param="suffix"
        )

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False, parse_special=False)

    parts = {
        "prefix": prompt if isinstance(prompt, list) else encode(prompt),
        "suffix": encode(suffix),
    }
    tokens: list[int] = []
    for part in forms[0].order:
        tokens += parts[part] if part in parts else [known[part]]
    return tokens

"""Options of the grammar compiler, in a module that is light to import."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["LlguidanceOptions"]

_Positive = Annotated[int, Meta(ge=1)]


class LlguidanceOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of ``llguidance``: how JSON is spaced, and what keeps one grammar from being others' trouble.

    Attributes:
        max_bytes: Largest schema, expression, list of choices or grammar.
        max_depth: Deepest nesting of brackets in one.
        item_separator: Expression for what stands between the items of JSON's arrays and objects.
        key_separator: Expression for what stands between its keys and values.
        whitespace: Expression for whitespace that it may have anywhere else, once at each place; empty for
            none.
        max_grammar_size: Most symbols of a compiled grammar.
        max_items: Most parser items of one step: how ambiguous a grammar may be.
        max_lexer_states: Most lexer states of one output; each takes one or two kilobytes.
        compile_fuel: Most work on a grammar's expressions, about 50 units a microsecond.
        step_fuel: Most work on them in one step, about 14 units a microsecond.
    """

    max_bytes: _Positive = 262_144
    max_depth: _Positive = 100
    item_separator: str = r",\x20?"
    key_separator: str = r":\x20?"
    whitespace: str = ""
    max_grammar_size: _Positive = 500_000
    max_items: _Positive = 50_000
    max_lexer_states: _Positive = 50_000
    compile_fuel: _Positive = 1_000_000
    step_fuel: _Positive = 200_000

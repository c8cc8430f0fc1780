"""Options of the scripted backend, in a module that is light to import."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["ScriptedOptions"]


class ScriptedOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the scripted backend.

    Attributes:
        end_every: One in so many tokens is the end token, by hash; 0 for never.
        step_s: Seconds that every step takes.
        token_s: Seconds that every token of a step takes.
        kv_capacity_tokens: Most tokens of all lanes together; ``None`` for lanes times context.
        period: The text repeats what it said so many tokens ago, as soon as there are so many; 0 for never.
        surprise_every: Of such text, one in so many tokens is another one, by hash; 0 for none.
        truncation: What ``truncate`` can do, as in ``Capabilities``.
        copy_prefix: Whether it can copy.
        snapshot: Whether it can make snapshots.
        exact_block: As in ``Capabilities``; above 1 a token's KV really depends on the piece that it is
            computed in: a whole block, less than one, or anything else.
        exact_from: As in ``Capabilities``.
        exact_tail: As in ``Capabilities``; with ``whole``, pieces of more than one token that are no whole
            blocks all differ.
        kernel: How it computes, for tuners to choose: ``wide`` takes half of ``step_s`` and ``token_s``,
            ``slow`` twice as long, ``blurred`` a quarter and is less sure of its tokens, and ``broken``
            kills the process as a miscompiled kernel does.
        generates: Whether it writes; if not it only embeds, and has no lanes.
        embed: Whether it embeds: texts with the same bytes get similar vectors.
        matryoshka: Whether its vectors may be cut.
        max_input_tokens: Most tokens of an input; ``None`` for the context length.
        samples: Whether it plays a device: it draws the tokens, and its logits have to be fetched.
    """

    end_every: int = 0
    step_s: float = 0.0
    token_s: float = 0.0
    kv_capacity_tokens: int | None = None
    period: int = 0
    surprise_every: int = 0
    truncation: str = "any"
    copy_prefix: bool = True
    snapshot: bool = False
    exact_block: int = 1
    exact_from: int = 0
    exact_tail: Literal["any", "whole"] = "any"
    kernel: Literal["plain", "slow", "wide", "blurred", "broken"] = "plain"
    generates: bool = True
    embed: bool = True
    matryoshka: bool = False
    max_input_tokens: int | None = None
    samples: bool = False

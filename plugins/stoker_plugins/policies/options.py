"""The policies' sections of the configuration; light to import."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["DeadlineOptions", "FairOptions", "FcfsOptions", "TokenBudgetOptions"]

NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class FcfsOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[plugins.fcfs]``.

    Attributes:
        max_passed: How many later requests may pass one whose KV does not fit; 0 for none.
        max_wait_s: One that has waited for so long is not passed any more.
    """

    max_passed: Count = 16
    max_wait_s: NotNegative = 30.0


class TokenBudgetOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[plugins.token-budget]``.

    Attributes:
        budget_tokens: Most predicted tokens of all running sequences together; 0 for what KV memory holds.
        output_weight: What a token that is still to be generated counts, where a prompt token counts 1.
        ageing_tokens_per_s: Predicted tokens that a second of waiting makes up for, so that nothing starves.
    """

    budget_tokens: Count = 0
    output_weight: NotNegative = 1.0
    ageing_tokens_per_s: Positive = 100.0


class FairOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[plugins.fair]``.

    Attributes:
        prefill_price: What a prompt token is charged.
        decode_price: What a generated token is charged.
        preempt: Whether a tenant below its share of lanes may take one from a tenant above it.
        defer: Whether a step that ends the prompt of a tenant below its share leaves out tokens of tenants
            above theirs, so that the first token comes sooner.
    """

    prefill_price: Positive = 1.0
    decode_price: Positive = 2.0
    preempt: bool = True
    defer: bool = True


class DeadlineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[plugins.deadline]``; a request's deadline is its ``timeout``.

    Attributes:
        default_deadline_s: A request without a deadline is ordered as if it were due so long after it came.
        preempt: Whether a request that would miss its deadline may take the lane of one that would not
            miss its own for that.
        slack: Estimates are multiplied by this before they are compared with a deadline.
        admission: Whether requests are refused that would miss their deadline.
    """

    default_deadline_s: Positive = 60.0
    preempt: bool = True
    slack: Positive = 1.2
    admission: bool = True

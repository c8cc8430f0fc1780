"""What policies compute from a sequence's view."""

from __future__ import annotations

from stoker import PolicyContext, SequenceView

__all__ = ["by_arrival", "output_left", "pending", "seconds_left", "still_waiting"]


def by_arrival(view: SequenceView) -> tuple[float, int]:
    """Sort key: oldest first, sequences of one request in their order."""
    return view.arrival_s, view.sequence_id


def pending(view: SequenceView) -> int:
    """Tokens whose KV is yet to be computed; 1 while it decodes."""
    return view.num_prompt_tokens + view.num_output_tokens - view.num_computed_tokens


def output_left(view: SequenceView) -> int:
    """Tokens that it will probably still generate, at least 1.

    One that has written more than was expected is expected to write as much again: the longer an answer
    is, the longer it will be.
    """
    expected = view.expected_output_tokens or view.max_tokens
    left = expected - view.num_output_tokens
    if left < 1:
        left = min(view.max_tokens - view.num_output_tokens, view.num_output_tokens)
    return max(1, left)


def seconds_left(view: SequenceView, context: PolicyContext) -> float:
    """Seconds until its end in the company that runs now, if it had a lane; 0 if costs are unknown."""
    cost = context.cost
    crowd = max(1, min(context.num_lanes, len(context.running)))
    uncomputed = pending(view)
    prefill = uncomputed if uncomputed > 1 else 0
    return prefill * cost.prefill_s + output_left(view) * cost.step_s(0, crowd)


def still_waiting(context: PolicyContext) -> list[SequenceView]:
    """The queue without those that were given a lane since the views were taken."""
    running = {view.sequence_id for view in context.running}
    return [view for view in context.waiting if view.sequence_id not in running]

"""``truncation: auto``: the oldest items are left out until the rest fits into the model's context."""

from collections.abc import Awaitable, Callable, Sequence

from stoker.api.responses.items import Turn

__all__ = ["fitting"]

_MOST_PER_TOKEN = 256  # characters; tokens of white space are the longest


async def fitting(
    turns: Sequence[Turn], count: Callable[[Sequence[Turn]], Awaitable[int]], most: int
) -> Sequence[Turn]:
    """The turns that are left once as few of the oldest as possible are gone.

    System messages at the beginning stay. What is left begins with a user's message, as templates want it.

    Args:
        turns: The conversation.
        count: Counts the tokens of a prompt.
        most: How many there may be.
    """
    size = sum(len(str(turn.message.content or "")) for turn in turns)
    if size <= most * _MOST_PER_TOKEN and await count(turns) <= most:
        return turns
    head = _num_leading(turns)
    starts = [at for at in range(head + 1, len(turns)) if turns[at].message.role == "user"]
    starts = _worth_counting(turns, starts, most)
    low, high = 0, len(starts) - 1
    while low < high:  # the first start from which on it fits; more turns never take fewer tokens
        middle = (low + high) // 2
        if await count(_from(turns, head, starts[middle])) <= most:
            high = middle
        else:
            low = middle + 1
    return _from(turns, head, starts[low]) if starts else turns


def _worth_counting(turns: Sequence[Turn], starts: list[int], most: int) -> list[int]:
    """Without those that surely leave too much: to count the tokens of an enormous prompt takes long."""
    size, at = 0, len(turns)
    kept: list[int] = []
    for start in reversed(starts):
        size += sum(len(str(turn.message.content or "")) for turn in turns[start:at])
        at = start
        if kept and size > most * _MOST_PER_TOKEN:
            break
        kept.append(start)
    return kept[::-1]


def _num_leading(turns: Sequence[Turn]) -> int:
    number = 0
    while number < len(turns) and turns[number].message.role in {"system", "developer"}:
        number += 1
    return number


def _from(turns: Sequence[Turn], head: int, start: int) -> Sequence[Turn]:
    return [*turns[:head], *turns[start:]]

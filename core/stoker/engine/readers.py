"""Readers that do not read: their sequences are paused, and in the end dropped.

What is generated for a reader that has stopped reading piles up in its stream. Above a bound the sequence
loses its lane to others that are read; when half of it has been read it queues again, and goes on where
it was. A reader that reads nothing at all for too long is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.engine.sequence import Sequence
from stoker.errors import SlowReaderError

if TYPE_CHECKING:
    from stoker.engine.scheduler import Scheduler

__all__ = ["ReaderLimits", "SlowReaders"]


@dataclass(slots=True, frozen=True)
class ReaderLimits:
    """What a slow reader may cost.

    Attributes:
        max_unread_tokens: Tokens that may wait for it.
        timeout_s: Seconds for which it may read nothing while its sequence is paused.
    """

    max_unread_tokens: int = 4096
    timeout_s: float = 30.0


class SlowReaders:
    """Pauses and resumes sequences of one scheduler; on the engine's thread.

    Args:
        scheduler: Whose sequences they are.
        limits: When.
    """

    def __init__(self, scheduler: Scheduler, limits: ReaderLimits) -> None:
        self._scheduler = scheduler
        self._timeout_s = limits.timeout_s
        self._slow: list[Sequence] = []
        # Sequence id -> what its reader had read when it was last seen to move, and when that was.
        self._seen: dict[int, tuple[int, float]] = {}
        self.max_unread = limits.max_unread_tokens

    def is_slow(self, sequence: Sequence) -> None:
        """Note that too much waits for a sequence's reader; it is paused after the step."""
        self._slow.append(sequence)

    def pause_slow(self) -> None:
        """Pause what was noted."""
        while self._slow:
            sequence = self._slow.pop()
            if sequence.sequence_id in self._scheduler.running:
                self._scheduler.preempt(sequence, "reader")
                seen = (sequence.stream.num_read, self._scheduler.clock())
                self._seen[sequence.sequence_id] = seen

    def forget(self, sequence: Sequence) -> None:
        """It is over."""
        self._seen.pop(sequence.sequence_id, None)

    def check(self) -> Iterator[tuple[Sequence, SlowReaderError]]:
        """Resume the sequences whose readers have caught up; yield those whose readers gave up."""
        scheduler = self._scheduler
        now_s = scheduler.clock()
        paused = scheduler.paused
        for sequence in list(paused.values()):
            stream = sequence.stream
            if stream.num_sent - stream.num_read <= self.max_unread // 2:
                scheduler.resume(sequence)
                continue
            num_read, since_s = self._seen.get(sequence.sequence_id, (-1, now_s))
            if stream.num_read != num_read:
                self._seen[sequence.sequence_id] = (stream.num_read, now_s)
            elif now_s - since_s >= self._timeout_s:
                yield (
                    sequence,
                    SlowReaderError(
                        f"the client has read nothing for {now_s - since_s:.0f} s although "
                        f"{stream.num_sent - stream.num_read} tokens wait for it"
                    ),
                )

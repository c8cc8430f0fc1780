"""When would a newcomer's turn come? Estimates from what a model is doing now.

The near future is played forward from event to event (a prompt is computed, an answer ends), with whole steps
between them at the costs measured lately: what runs keeps its lanes until it is done, each lane that falls
free takes the next of the queue. Further back in the queue, where single ends even out, the work of each
sequence is added up. What nobody can know, how long an answer will be, is taken from how long answers were
lately. Nothing is played further than it is asked for, so that a refusal costs microseconds.
"""

from __future__ import annotations

import copy
import functools
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stoker.interfaces import EngineSnapshot, StepCost
from stoker.types import Request, SequenceView

__all__ = ["Forecast"]

_PLAYED = 64  # positions that are played, or twice the lanes if those are more; behind them work is added up
_MAX_EVENTS = 256  # until a newcomer's end is extrapolated
_ROUNDING = 1e-6  # of a token or a step


class _Size(NamedTuple):
    """What a sequence takes.

    Attributes:
        prompt: Prompt tokens to compute.
        output: Tokens to generate.
        held: Tokens of KV memory once it has a lane, before it generates.
    """

    prompt: float
    output: float
    held: float


class Forecast:
    """A model's near future. Cheap to make; not for several threads.

    It assumes that the queue is served in the given order, that nobody cancels, and that the device has no
    other model to run.

    Args:
        snapshot: What the model is doing now.
        ahead: The waiting requests that come before the newcomer; by default all of them.
    """

    def __init__(self, snapshot: EngineSnapshot, ahead: Sequence[Request] | None = None) -> None:
        self._snapshot = snapshot
        cost = snapshot.cost
        self._cost = StepCost(
            base_s=_sane(cost.base_s),
            prefill_s=_sane(cost.prefill_s),
            decode_s=_sane(cost.decode_s),
        )
        self._prompt_ratio = min(1.0, _sane(snapshot.prompt_ratio))
        self._output_ratio = min(1.0, _sane(snapshot.output_ratio))
        self._queue: list[_Size] = []  # as far as it was looked at
        self._unseen = self._sizes(snapshot.waiting if ahead is None else ahead)
        self._num_played = max(_PLAYED, 2 * snapshot.num_lanes)
        self._play = _Play(snapshot, self._cost)
        for view in snapshot.running:
            self._play.start(self._rest(view))
        self._times: list[float] = []  # of the positions played so far
        self._elapsed_s = _sane(snapshot.elapsed_s)

    @property
    def is_known(self) -> bool:
        """Whether there were steps to learn from; without them every answer is 0."""
        return self._cost != StepCost()

    def time_to_admit(self, position: int | None = None) -> float:
        """Seconds until the sequence at ``position`` of the queue gets a lane.

        Args:
            position: 0 is the next one; by default behind all that wait. Further back than that,
                sequences of the usual size are assumed.
        """
        if not self.is_known:
            return 0.0
        return max(0.0, self._admitted_s(position) - self._elapsed_s)

    def _admitted_s(self, position: int | None) -> float:
        """Seconds from the beginning of the step that runs now."""
        at = len(self._whole_queue()) if position is None else max(0, position)
        last = min(at, self._num_played - 1)
        while len(self._times) <= last:
            if self._times:
                self._play.start(self._size(len(self._times) - 1))
            self._play.run_until_free(self._size(len(self._times)))
            self._times.append(self._play.now_s)
        seconds = self._times[last]
        if at == last:
            return seconds
        work = self._work_behind
        known = min(at - last, len(work) - 1)
        return seconds + work[known] + (at - last - known) * self._work_s(self._usual)

    def time_to_finish(self, num_prompt_tokens: int, max_tokens: int | None) -> float:
        """Seconds until a newcomer of that size, behind all that wait, would be done.

        Args:
            num_prompt_tokens: Length of its prompt.
            max_tokens: Tokens it asks for; ``None`` if it does not say.
        """
        if not self.is_known:
            return 0.0
        starts = self._admitted_s(None)
        size = self._make(num_prompt_tokens, max_tokens)
        # The lane that fell free last is now its own. A queue now means a queue then: others follow.
        company = self._usual if self._queue else None
        ends = starts + self._play.branch().service_s(size, company)
        return max(0.0, ends - self._elapsed_s)

    # ------------------------------------------------------------------ sizes

    def _sizes(self, requests: Sequence[Request]) -> Iterator[_Size]:
        admitted: dict[str, int] = {}
        for view in self._snapshot.running:
            admitted[view.request_id] = admitted.get(view.request_id, 0) + 1
        for request in requests:
            size = self._make(len(request.prompt_token_ids), request.sampling.max_tokens)
            for _ in range(request.n - admitted.get(request.request_id, 0)):
                yield size

    def _whole_queue(self) -> list[_Size]:
        self._queue += self._unseen
        return self._queue

    def _make(self, num_prompt_tokens: int, max_tokens: int | None) -> _Size:
        computed = max(1.0, num_prompt_tokens * self._prompt_ratio)
        return _Size(computed, self._output(max_tokens), num_prompt_tokens)

    def _output(self, max_tokens: int | None) -> float:
        if max_tokens is None:
            return max(1.0, _sane(self._snapshot.mean_output_tokens))
        return max(1.0, max_tokens * self._output_ratio)

    def _rest(self, view: SequenceView) -> _Size:
        """What is left to do for a sequence that runs."""
        num_tokens = view.num_prompt_tokens + view.num_output_tokens
        pending = num_tokens - view.num_computed_tokens
        # What was expected when it came may have been learned better since.
        expected = min(view.expected_output_tokens or math.inf, self._output(view.max_tokens))
        left = expected - view.num_output_tokens
        if left < 1:
            # It has written more than was expected: the longer an answer is, the longer it will be.
            left = min(view.max_tokens - view.num_output_tokens, view.num_output_tokens)
        return _Size(pending if pending > 1 else 0, max(1.0, left), num_tokens)

    def _size(self, position: int) -> _Size:
        while len(self._queue) <= position:
            size = next(self._unseen, None)
            if size is None:
                return self._usual
            self._queue.append(size)
        return self._queue[position]

    @functools.cached_property
    def _usual(self) -> _Size:
        """The mean size of what waits, or of what runs."""
        sizes = self._whole_queue() or [
            self._make(view.num_prompt_tokens, view.max_tokens) for view in self._snapshot.running
        ]
        if not sizes:
            return _Size(1.0, 1.0, 1.0)
        return _Size(*(sum(column) / len(sizes) for column in zip(*sizes, strict=True)))

    @functools.cached_property
    def _work_behind(self) -> list[float]:
        """Seconds of work from the last position that is played to each one behind it."""
        work = map(self._work_s, self._whole_queue()[self._num_played - 1 :])
        return list(itertools.accumulate(work, initial=0.0))

    def _work_s(self, size: _Size) -> float:
        """Seconds of the device that a sequence takes while all lanes that can be used are busy."""
        play, cost = self._play, self._cost
        crowd = min(play.num_lanes, max(1.0, play.capacity / (size.held + size.output / 2)))
        steps = max(size.output / crowd, size.prompt / play.max_prefill)
        return cost.base_s * steps + cost.prefill_s * size.prompt + cost.decode_s * size.output


class _Play:
    """Lanes, played forward from one end of a prompt or answer to the next.

    Args:
        snapshot: For the limits; what runs is yet to be started.
        cost: What steps cost.
    """

    def __init__(self, snapshot: EngineSnapshot, cost: StepCost) -> None:
        self.now_s = 0.0
        self.num_lanes = max(1, snapshot.num_lanes, len(snapshot.running))
        self.max_prefill = max(1, snapshot.max_prefill_tokens)
        self.capacity: float = snapshot.kv_tokens_capacity or math.inf
        self._cost = cost
        # Steps so far: every sequence that decodes keeps the mark at which it is done.
        self._step = 0.0
        self._held = 0.0
        self.decoding: list[tuple[float, int, _Size]] = []
        # Prompt tokens left, in order of their start.
        self.prefilling: list[tuple[float, int, _Size]] = []
        self._num_started = 0

    def branch(self) -> _Play:
        """One that can be played on without moving this one."""
        play = copy.copy(self)
        play.decoding = self.decoding[:]
        play.prefilling = self.prefilling[:]
        return play

    def start(self, size: _Size) -> int:
        """Give a sequence a lane; returns its number."""
        self._num_started += 1
        self._held += size.held
        if size.prompt:
            self.prefilling.append((size.prompt, self._num_started, size))
        else:
            mark = self._step + size.output
            heapq.heappush(self.decoding, (mark, self._num_started, size))
        return self._num_started

    def has_room(self, size: _Size) -> bool:
        """Whether a sequence could start now: a free lane, and KV memory for its prompt."""
        running = len(self.decoding) + len(self.prefilling)
        return not running or (running < self.num_lanes and self._held + size.held < self.capacity)

    def run_until_free(self, size: _Size) -> None:
        """Run until a sequence can start; at once if it can."""
        while not self.has_room(size):
            self._run()

    def service_s(self, size: _Size, company: _Size | None) -> float:
        """Seconds from the start of a sequence to its end.

        Args:
            size: Of the sequence.
            company: Of those that take every other lane that falls free; ``None`` if nobody does.
        """
        began_s, began = self.now_s, self._step
        own = self.start(size)
        for _ in range(_MAX_EVENTS):
            while company is not None and self.has_room(company):
                self.start(company)
            if own in self._run():
                return self.now_s - began_s
        steps = [mark - self._step for mark, number, _ in self.decoding if number == own]
        for left, number, _ in self.prefilling:
            if number == own:
                share = self.max_prefill / len(self.prefilling)
                steps.append(left / share + size.output)
        elapsed_s = self.now_s - began_s
        return elapsed_s + sum(steps) * elapsed_s / (self._step - began)

    def _run(self) -> list[int]:
        """Run whole steps until something ends; returns the numbers of the sequences that are done."""
        decoding, prefilling = self.decoding, self.prefilling
        pending = sum(left for left, _, _ in prefilling)
        steps = math.inf
        if prefilling:
            # Half of a step's prompt tokens are the oldest's, half are for who is done the soonest.
            soonest = min(left for left, _, _ in prefilling)
            rate = self.max_prefill / (1 if prefilling[0][0] == soonest else 2)
            steps = math.ceil(min(soonest, prefilling[0][0]) / rate)
        if decoding:
            steps = min(steps, math.ceil(decoding[0][0] - self._step))
        steps = max(1.0, steps)
        tokens = min(pending, steps * self.max_prefill)
        cost = self._cost
        self.now_s += steps * (cost.base_s + cost.decode_s * len(decoding))
        self.now_s += cost.prefill_s * tokens
        self._step += steps
        self._held += steps * len(decoding)
        return self._take_out(self._prefill(tokens))

    def _prefill(self, tokens: float) -> list[tuple[int, _Size]]:
        """Compute prompt tokens as the scheduler shares them; returns the prompts that are done."""
        if not self.prefilling:
            return []
        left = {number: rest for rest, number, _ in self.prefilling}
        oldest = self.prefilling[0][1]
        part = min(left[oldest], tokens / 2)
        left[oldest] -= part
        tokens -= part
        for number in sorted(left, key=left.__getitem__):
            part = min(left[number], tokens)
            left[number] -= part
            tokens -= part
        done = [(n, size) for _, n, size in self.prefilling if left[n] <= _ROUNDING]
        self.prefilling = [
            (left[n], n, size) for _, n, size in self.prefilling if left[n] > _ROUNDING
        ]
        return done

    def _take_out(self, prefilled: list[tuple[int, _Size]]) -> list[int]:
        """Move on what has reached its end; returns the numbers of the sequences that are done."""
        decoding = self.decoding
        done: list[tuple[int, _Size]] = []
        while decoding and decoding[0][0] <= self._step + _ROUNDING:
            done.append(heapq.heappop(decoding)[1:])
        for number, size in prefilled:
            # The step that ends a prompt samples the first token of its answer.
            if size.output > 1:
                heapq.heappush(decoding, (self._step + size.output - 1, number, size))
            else:
                done.append((number, size))
        for _, size in done:
            self._held = max(0.0, self._held - size.held - size.output)
        return [number for number, _ in done]


def _sane(number: float) -> float:
    """A finite number from 0 up, whatever was measured."""
    return number if 0 <= number < math.inf else 0.0

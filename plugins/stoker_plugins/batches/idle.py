"""When batches may use a model: in what others leave idle, and only as long as nobody waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable

from stoker import ServerContext
from stoker_plugins.batches.options import BatchesOptions

__all__ = ["LOWEST_PRIORITY", "IdleCapacity"]

LOWEST_PRIORITY = 2**31 - 1
"""The priority of batches' requests. Lower runs first, and clients may send none that is higher."""

_QUIET_S = 1.0  # after giving way: who came once may come again, and would have to wait again
_PATIENCE_S = 0.25  # for lanes that were given up to reach those who wait


class IdleCapacity:
    """Tells how many requests of batches may be started, and how many must give way.

    A request without a lane needs more than priority: most policies take no lane away once it is given.
    So those of batches give theirs back, and start anew when it is quiet.

    Args:
        context: The server.
        options: How much is left free, and how soon to give way.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        context: ServerContext,
        options: BatchesOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._options = options
        self._clock = clock
        self._lanes = {model.model_id: model.info.num_lanes for model in context.models()}
        self._quiet_until: dict[str, float] = {}
        self._next_yield: dict[str, float] = {}

    def num_startable(self, model: str) -> int:
        """How many requests of batches a model can take on now; 0 if it is not served."""
        lanes = self._lanes.get(model)
        if lanes is None or self._clock() < self._quiet_until.get(model, 0.0):
            return 0
        load = self._context.load(model)
        if load.num_waiting:
            return 0
        if not lanes:  # it only embeds, and its queue knows who is less urgent
            return self._options.concurrency
        reserve = min(self._options.reserve_lanes, lanes - 1)
        return max(0, load.num_free_lanes - reserve)

    def num_to_yield(self, model: str) -> int:
        """How many requests of batches should give up their lanes of a model for others, now."""
        now_s = self._clock()
        if now_s < self._next_yield.get(model, 0.0) or not self._context.load(model).num_waiting:
            return 0
        if not self._lanes.get(model):
            return 0  # there are no lanes to give up
        snapshot = self._context.snapshot(model)
        patient_until_s = snapshot.now_s - self._options.give_way_s
        number = sum(
            request.n
            for request in snapshot.waiting
            if request.priority < LOWEST_PRIORITY and request.arrival_s <= patient_until_s
        )
        if number:
            self._quiet_until[model] = now_s + _QUIET_S
            self._next_yield[model] = now_s + _PATIENCE_S
        return number

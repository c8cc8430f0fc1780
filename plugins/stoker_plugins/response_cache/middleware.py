"""The middleware: answers from the store, lets identical requests share, and counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from stoker import DeltaStream, Middleware, Request, ServedModel, ServerContext
from stoker_plugins.response_cache.answers import Answer, Flight, replay
from stoker_plugins.response_cache.keys import (
    CACHE_HEADER,
    directives_of,
    is_repeatable,
    request_key,
)
from stoker_plugins.response_cache.options import ResponseCacheOptions
from stoker_plugins.response_cache.reader import Reader
from stoker_plugins.response_cache.store import AnswerStore

__all__ = ["Counts", "ResponseCache"]

Forward = Callable[[Request], DeltaStream]


@dataclass(slots=True)
class Counts:
    """What happened to the requests of one model.

    Attributes:
        queries: Requests that might have been answered from the cache.
        hits: Of those, answered from it.
        joins: Of those, answered together with an identical one under way.
        stores: Answers stored.
        moves: Requests that needed a second answer because the one they shared failed.
    """

    queries: int = 0
    hits: int = 0
    joins: int = 0
    stores: int = 0
    moves: int = 0


class ResponseCache(Middleware):
    """Computes identical requests once, if they are greedy or bring a seed.

    Args:
        context: The server.
        options: ``[plugins.response-cache]``.
        clock: Monotonic seconds; the server's own.

    Attributes:
        store: The answers that are kept.
        counts: By model.
    """

    def __init__(
        self,
        context: ServerContext,
        options: ResponseCacheOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._options = options or ResponseCacheOptions()
        self._clock = clock
        self.store = AnswerStore(
            self._options.max_bytes, self._options.ttl_s, self._options.eviction, clock
        )
        self.counts = {served.model_id: Counts() for served in context.models()}
        self._flights: dict[bytes, Flight] = {}  # those that may be joined
        self._running: set[Flight] = set()  # asyncio itself keeps no task alive
        if "metrics" in context.observers:
            from stoker_plugins.response_cache.metrics import register

            register(self, context)

    @property
    def num_running(self) -> int:
        """Answers that are being generated."""
        return len(self._running)

    def submit(self, request: Request, forward: Forward) -> DeltaStream:
        """Answer it from the cache, or together with an identical one, or compute it and remember.

        Raises:
            InvalidRequestError: Its ``x-stoker-cache`` header says something unknown.
        """
        directives = directives_of(request)
        key = None
        if "no-store" not in directives and is_repeatable(request):
            key = self._key(request)
        if key is None:
            request.response_headers[CACHE_HEADER] = "skip"
            return forward(request)
        counts = self.counts.setdefault(request.model, Counts())
        counts.queries += 1
        outcome = "miss"
        answer: Answer | None = None
        if "no-cache" not in directives:
            stored = self.store.get(key)
            if stored is not None:
                counts.hits += 1
                outcome, answer = "hit", replay(stored, request)
                age_s = self._clock() - stored.stored_s
                request.response_headers["age"] = str(int(age_s))
            else:
                answer = self._joinable(key, request)
                if answer is not None:
                    counts.joins += 1
                    outcome = "joined"
        if answer is None:
            answer = self._launch(key, request, forward)
        request.response_headers[CACHE_HEADER] = outcome

        def find_another(request: Request) -> Answer:
            counts.moves += 1
            return self._joinable(key, request) or self._launch(key, request, forward)

        return Reader(answer, request, find_another, self._clock)

    def _key(self, request: Request) -> bytes | None:
        try:
            return request_key(
                request,
                self._served(request.model),
                per_tenant=self._options.isolation == "tenant",
            )
        except TypeError:  # a middleware asks for something that cannot be compared
            return None

    def _served(self, model: str) -> ServedModel:
        return next(served for served in self._context.models() if served.model_id == model)

    def _joinable(self, key: bytes, request: Request) -> Flight | None:
        flight = self._flights.get(key)
        return flight if flight is not None and flight.may_join(request) else None

    def _launch(self, key: bytes, request: Request, forward: Forward) -> Flight:
        flight = Flight(key, request, forward(request), self._closed)
        self._flights[key] = flight  # whoever comes later joins the latest
        self._running.add(flight)
        return flight

    def _closed(self, flight: Flight) -> None:
        """Nobody may join a flight any more: its last reader has left it, or it is over."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]
        if not flight.is_over:
            return
        self._running.discard(flight)
        if flight.is_complete and self.store.put(flight.key, flight.stored()):
            self.counts[flight.request.model].stores += 1

"""Drive an engine by hand, step by step, without threads or an event loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from stoker.config import CacheConfig, SchedulerConfig
from stoker.engine.model_engine import ModelEngine
from stoker.engine.readers import ReaderLimits
from stoker.tenants import Tenants
from stoker.testing.clock import FakeClock
from stoker.testing.scripted import ScriptedRuntime
from stoker.types import (
    Delta,
    FinishReason,
    Request,
    RequestRecord,
    SamplingParams,
    SequenceTrace,
)

if TYPE_CHECKING:
    from stoker.config import SpeculationConfig, TenantConfig
    from stoker.engine.client import RequestStream
    from stoker.engine.drafters import Drafter
    from stoker.engine.model_engine import Outbox
    from stoker.grammar import Grammar
    from stoker.interfaces import (
        EvictionStrategy,
        Observer,
        Runtime,
        SchedulingPolicy,
        SnapshotStore,
    )

__all__ = ["EngineHarness", "Submitted"]


class Submitted:
    """A request in a harness, and what came of it.

    Args:
        request: The request.

    Attributes:
        deltas: What was delivered so far.
        records: One record for each sequence that has ended.
        num_sent: Deltas that the engine has handed over.
        num_read: Of those, how many were read; a harness reads at once unless ``reads`` is false.
        reads: Whether its reader reads.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.deltas: list[Delta] = []
        self.records: list[RequestRecord] = []
        self.sequences: Sequence[Any] = ()
        self.num_sent = 0
        self.num_read = 0
        self.reads = True

    def traces(self) -> list[SequenceTrace]:
        """What happened to its sequences; complete once they have ended."""
        return [r.trace for r in self.records if r.trace is not None]

    def text(self, index: int = 0) -> str:
        """The text of one of its sequences."""
        return "".join(delta.text for delta in self.deltas if delta.index == index)

    def finish(self, index: int = 0) -> Delta | None:
        """The last delta of one of its sequences; ``None`` while it runs."""
        ends = [d for d in self.deltas if d.index == index and d.finish_reason is not None]
        return ends[0] if ends else None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why its first sequence ended."""
        last = self.finish()
        return None if last is None else last.finish_reason


class EngineHarness:
    """One model's engine, a clock, and a step at a time.

    Args:
        policy: The policy under test.
        runtime: The runtime; by default a scripted one.
        scheduler: Token budgets.
        cache: KV reuse.
        observers: Told of steps and ends.
        clock: Seconds; by default a ``FakeClock`` that each step moves by ``step_s``.
        step_s: How long a step takes on the fake clock.
        tenants: Weights and reservations.
        reader_limits: What a reader that does not read may cost.
        eviction: Which kept prefix goes first.
        store: Where evicted prefixes go.
        drafter: Guesses tokens for speculative decoding; by default nobody does.
        speculation: How much it guesses.
    """

    def __init__(
        self,
        policy: SchedulingPolicy,
        *,
        runtime: Runtime | None = None,
        scheduler: SchedulerConfig | None = None,
        cache: CacheConfig | None = None,
        observers: Sequence[Observer] = (),
        clock: Callable[[], float] | None = None,
        step_s: float = 0.01,
        tenants: Sequence[TenantConfig] = (),
        reader_limits: ReaderLimits | None = None,
        eviction: EvictionStrategy | None = None,
        store: SnapshotStore | None = None,
        drafter: Drafter | None = None,
        speculation: SpeculationConfig | None = None,
    ) -> None:
        self.runtime = runtime or ScriptedRuntime()
        self.fake_clock = FakeClock()
        self.clock = clock or self.fake_clock
        self.step_s = step_s
        self.num_submitted = 0
        self.engine = ModelEngine(
            "model",
            self.runtime,
            policy,
            scheduler or SchedulerConfig(),
            cache or CacheConfig(),
            observers,
            self.clock,
            Tenants(tenants),
            reader_limits=reader_limits,
            eviction=eviction,
            store=store,
            drafter=drafter,
            speculation=speculation,
        )

    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        n: int = 1,
        priority: int = 0,
        tenant: str = "anonymous",
        cache_salt: str = "",
        queue_deadline_s: float | None = None,
        deadline_s: float | None = None,
        predicted: str | Sequence[int] = (),
        wants_token_ids: bool = False,
        wants_progress: bool = False,
        grammar: Grammar | None = None,
        **sampling: Any,
    ) -> Submitted:
        """Queue a request; ``sampling`` are fields of ``SamplingParams`` (greedy, 16 tokens by default)."""
        self.num_submitted += 1
        request = Request(
            request_id=f"request-{self.num_submitted}",
            model="model",
            prompt_token_ids=self._tokens(prompt),
            sampling=SamplingParams(**({"temperature": 0.0, "max_tokens": 16} | sampling)),
            n=n,
            priority=priority,
            tenant=tenant,
            cache_salt=cache_salt,
            arrival_s=self.clock(),
            queue_deadline_s=queue_deadline_s,
            deadline_s=deadline_s,
            predicted_token_ids=self._tokens(predicted),
            wants_token_ids=wants_token_ids,
            wants_progress=wants_progress,
            grammar=grammar,
        )
        submitted = Submitted(request)
        self.engine.count_submitted(request)
        self.engine.submit(_as_stream(submitted))
        return submitted

    def _tokens(self, text: str | Sequence[int]) -> list[int]:
        if not isinstance(text, str):
            return list(text)
        return self.runtime.tokenizer.encode(text, add_special=False, parse_special=True)

    def abort(self, submitted: Submitted) -> None:
        """Abort a request, as its reader would."""
        self._deliver(lambda outbox: self.engine.abort(_as_stream(submitted), outbox))

    def cancel(self, submitted: Submitted, error: Exception) -> None:
        """End a request with an error, as ``DELETE /v1/requests/{id}`` does."""
        self._deliver(lambda outbox: self.engine.cancel(_as_stream(submitted), error, outbox))

    def step(self) -> int:
        """One step; returns how many deltas came out of it."""
        self._deliver(self.engine.look_after_readers)
        delivered = self._deliver(self.engine.step)
        self.fake_clock.advance(self.step_s)
        return delivered

    @staticmethod
    def _deliver(action: Callable[[Outbox], None]) -> int:
        outbox: Outbox = []
        action(outbox)
        for stream, delta in outbox:
            submitted = cast(Any, stream)
            submitted.deltas.append(delta)
            if submitted.reads:
                submitted.num_read = submitted.num_sent
        return len(outbox)

    def run(self, max_steps: int = 10_000) -> int:
        """Step until nothing is left to do; returns the number of steps.

        Raises:
            RuntimeError: It is still not done after ``max_steps``.
        """
        for steps in range(max_steps):
            if not (self.engine.has_work or self.engine.scheduler.paused):
                return steps
            self.step()
        raise RuntimeError(f"the engine still has work after {max_steps} steps")


def _as_stream(submitted: Submitted) -> RequestStream:
    # The engine only needs ``request`` and ``records`` of a stream, and its identity.
    return cast("RequestStream", submitted)

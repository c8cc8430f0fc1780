"""What a round's answers amount to, and what many rounds have in common."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stoker_plugins.bench.target import Answer

__all__ = ["Figures", "Objectives", "Spread", "figures", "gaps_s", "ratios", "spread"]


class Figures(msgspec.Struct, kw_only=True):
    """Of one round on one target. Latencies of answers that failed are not in them; NaN where there are none.

    Attributes:
        requests: Sent.
        completed: With a complete answer.
        failures: How many of each kind.
        duration_s: From the first request's start to the last answer's end.
        prompt_tokens: Of complete answers, as the server counted.
        output_tokens: Of complete answers: the server's count, else that of the events.
        cached_tokens: Prompt tokens that the server did not compute; ``None`` if it does not say.
        ended_early: Answers that ended before they had the tokens asked for.
        output_tok_s: Output tokens / duration.
        requests_s: Complete answers / duration.
        ttft_p50_ms: Time to first token, from when the request was due.
        ttft_p99_ms: The same, 99th percentile.
        itl_p50_ms: Gap between two events with text; tokens that come together have gaps of 0.
        itl_p99_ms: The same, 99th percentile.
        worst_gap_ms: The longest gap of all.
        tpot_p50_ms: Time per output token after the first, of each answer.
        e2e_p50_ms: Whole time of an answer, from when it was due.
        e2e_p99_ms: The same, 99th percentile.
        request_tok_s_p50: Output tokens / whole time, of each answer.
        good_share: Share of all requests that met every objective; ``None`` without objectives.
        good_requests_s: Requests that met every objective / duration.
        lag_p99_ms: How late requests were sent, where they had a time.
        lag_max_ms: The same, the worst.
        client_cpu: CPU time of the load generator / duration.
    """

    requests: int = 0
    completed: int = 0
    failures: dict[str, int] = msgspec.field(default_factory=dict)
    duration_s: float = math.nan
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    ended_early: int = 0
    output_tok_s: float = math.nan
    requests_s: float = math.nan
    ttft_p50_ms: float = math.nan
    ttft_p99_ms: float = math.nan
    itl_p50_ms: float = math.nan
    itl_p99_ms: float = math.nan
    worst_gap_ms: float = math.nan
    tpot_p50_ms: float = math.nan
    e2e_p50_ms: float = math.nan
    e2e_p99_ms: float = math.nan
    request_tok_s_p50: float = math.nan
    good_share: float | None = None
    good_requests_s: float | None = None
    lag_p99_ms: float = 0.0
    lag_max_ms: float = 0.0
    client_cpu: float = 0.0


class Objectives(msgspec.Struct, frozen=True):
    """Service-level objectives: a request is good if it meets all of them (goodput, as in DistServe).

    Attributes:
        limits_s: Most seconds, by name: ``ttft``, ``tpot`` (mean time per output token after the first),
            ``itl`` (the answer's 99th percentile of gaps), ``gap`` (its longest gap), ``e2e``.
    """

    limits_s: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> Objectives:
        """Understand ``ttft=500ms,itl=100ms``.

        Raises:
            ValueError: An objective or its time is unknown; the message says which.
        """
        limits = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in _MEASURES:
                raise ValueError(
                    f"there is no objective {name!r}: there are {', '.join(_MEASURES)}"
                )
            found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", value.strip())
            if not found:
                raise ValueError(f"{name}={value!r} is no time: write 500ms or 0.5s")
            limits[name] = float(found[1]) / (1e3 if found[2] == "ms" else 1.0)
        return cls(limits)

    def met_by(self, answer: Answer) -> bool:
        """Whether a complete answer meets them all."""
        return all(_MEASURES[name](answer) <= most for name, most in self.limits_s.items())


def gaps_s(answer: Answer) -> NDArray[np.float64]:
    """Seconds between the answer's events."""
    import numpy as np

    return np.diff(np.frombuffer(answer.stamps, np.float64))


def _ttft_s(answer: Answer) -> float:
    return answer.stamps[0] - answer.due_s


def _e2e_s(answer: Answer) -> float:
    return answer.end_s - answer.due_s


def _tpot_s(answer: Answer) -> float:
    """0 for an answer of one token: it has no next one to wait for."""
    following = answer.output_tokens - 1
    return (answer.stamps[-1] - answer.stamps[0]) / following if following > 0 else 0.0


def _itl_p99_s(answer: Answer) -> float:
    return _quantile(gaps_s(answer), 0.99, 0.0)


def _gap_s(answer: Answer) -> float:
    return _quantile(gaps_s(answer), 1.0, 0.0)


_MEASURES = {
    "ttft": _ttft_s,
    "tpot": _tpot_s,
    "itl": _itl_p99_s,
    "gap": _gap_s,
    "e2e": _e2e_s,
}


def _quantile(
    values: Sequence[float] | NDArray[np.float64], share: float, otherwise: float = math.nan
) -> float:
    """By linear interpolation."""
    import numpy as np

    return float(np.quantile(values, share)) if len(values) else otherwise


def figures(
    answers: Sequence[Answer],
    objectives: Objectives | None = None,
    *,
    gap_group: str = "",
    cpu_s: float = 0.0,
) -> Figures:
    """Sum up a round.

    Args:
        answers: All of them, failed ones too.
        objectives: What goodput is counted by.
        gap_group: The group that ``worst_gap_ms`` is of; empty for all.
        cpu_s: CPU time that the load generator spent.
    """
    import numpy as np

    complete = [answer for answer in answers if not answer.failure]
    result = Figures(
        requests=len(answers),
        completed=len(complete),
        failures=dict(
            Counter(answer.failure for answer in answers if answer.failure).most_common()
        ),
    )
    if lags := [answer.sent_s - answer.due_s for answer in answers]:
        result.lag_p99_ms = _quantile(lags, 0.99) * 1e3
        result.lag_max_ms = max(lags) * 1e3
    if answers and objectives is not None:
        result.good_share = sum(map(objectives.met_by, complete)) / len(answers)
    if not complete:
        if objectives is not None:
            result.good_requests_s = 0.0
        return result
    duration_s = max(answer.end_s for answer in complete) - min(a.sent_s for a in complete)
    result.duration_s = duration_s
    result.client_cpu = cpu_s / duration_s
    _count_tokens(result, complete)
    result.requests_s = len(complete) / duration_s
    if result.good_share is not None:
        result.good_requests_s = result.good_share * len(answers) / duration_s
    first = [_ttft_s(answer) for answer in complete]
    result.ttft_p50_ms, result.ttft_p99_ms = _middle_and_tail_ms(first)
    gaps = np.concatenate([gaps_s(answer) for answer in complete])
    result.itl_p50_ms, result.itl_p99_ms = _middle_and_tail_ms(gaps)
    steady = [answer for answer in complete if answer.group == gap_group or not gap_group]
    worst = [_gap_s(answer) for answer in steady if len(answer.stamps) > 1]
    result.worst_gap_ms = max(worst, default=math.nan) * 1e3
    several = [_tpot_s(answer) for answer in complete if answer.output_tokens > 1]
    result.tpot_p50_ms = _quantile(several, 0.5) * 1e3
    whole = [_e2e_s(answer) for answer in complete]
    result.e2e_p50_ms, result.e2e_p99_ms = _middle_and_tail_ms(whole)
    speeds = [a.output_tokens / e2e_s for a, e2e_s in zip(complete, whole, strict=True)]
    result.request_tok_s_p50 = _quantile(speeds, 0.5)
    return result


def _count_tokens(result: Figures, complete: Sequence[Answer]) -> None:
    result.prompt_tokens = sum(answer.prompt_tokens for answer in complete)
    result.output_tokens = sum(answer.output_tokens for answer in complete)
    result.output_tok_s = result.output_tokens / result.duration_s
    result.ended_early = sum(
        answer.completion_tokens is not None and answer.completion_tokens < answer.asked_tokens
        for answer in complete
    )
    known = [a.cached_tokens for a in complete if a.cached_tokens is not None]
    result.cached_tokens = sum(known) if known else None


def _middle_and_tail_ms(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    return _quantile(values, 0.5) * 1e3, _quantile(values, 0.99) * 1e3


class Spread(msgspec.Struct, frozen=True):
    """One figure over the rounds."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float | None]) -> Spread | None:
    """The median and the range of what is known; nothing if nothing is."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return None
    return Spread(_quantile(known, 0.5), min(known), max(known))


def ratios(first: Sequence[float | None], other: Sequence[float | None]) -> Spread | None:
    """The first target's figure over another's, round by round: a drift of the machine hits both alike."""
    pairs = zip(first, other, strict=False)
    return spread(a / b for a, b in pairs if a is not None and b is not None and b)

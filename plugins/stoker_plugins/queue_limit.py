"""Backpressure: a bounded queue. What does not fit is refused at once, with the time after which it would."""

from __future__ import annotations

from stoker import LoadSnapshot, Middleware, RateLimitError, Request, ServerContext

__all__ = ["QueueLimit"]

_UNKNOWN_WAIT_S = 5.0


class QueueLimit(Middleware):
    """Refuses requests that would overfill a model's queue (``[admission] max_queue_*``).

    Args:
        context: The server, for its configuration and the queues' lengths.
    """

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._max_requests = context.config.admission.max_queue_requests
        self._max_tokens = context.config.admission.max_queue_tokens

    async def on_request(self, request: Request) -> Request:
        """Let it pass, or raise ``RateLimitError`` with a measured ``Retry-After``."""
        load = self._context.load(request.model)
        tokens = request.n * (len(request.prompt_token_ids) + (request.sampling.max_tokens or 0))
        if load.num_waiting + request.n > self._max_requests:
            what = f"{load.num_waiting} requests are waiting, of at most {self._max_requests}"
        elif load.num_waiting and load.waiting_tokens + tokens > self._max_tokens:
            what = f"{load.waiting_tokens} tokens are waiting, of at most {self._max_tokens}"
        else:
            return request
        raise RateLimitError(
            f"the queue is full: {what}; retry later",
            code="queue_full",
            retry_after_s=_time_to_drain(load),
        )


def _time_to_drain(load: LoadSnapshot) -> float:
    """Seconds until half of the queue is worked off, at the measured rate."""
    if not load.tokens_per_s:
        return _UNKNOWN_WAIT_S
    return 0.5 * load.waiting_tokens / load.tokens_per_s

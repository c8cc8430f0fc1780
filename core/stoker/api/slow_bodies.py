"""Bodies that trickle: a client may not hold a request open by sending next to nothing."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from litestar.types import Receive

from stoker.errors import DeadlineError

__all__ = ["impatient"]

_LEAST_BYTES_PER_S = 10_000


def impatient(receive: Receive, timeout_s: float) -> Receive:
    """What receives a body as ``receive`` does, from clients that send it fast enough.

    There are ``timeout_s`` seconds to begin with; waiting uses them up, and every 10 kB that come give one
    back (as ``MinRate`` of Apache's mod_reqtimeout). Once the body is there nothing is limited any more.

    Args:
        receive: Of the request.
        timeout_s: How long the client may be silent.

    Raises:
        DeadlineError: What is returned raises it: the time is used up. The connection is to be closed.
    """
    left_s = timeout_s
    is_complete = False

    async def receive_in_time() -> Any:
        nonlocal left_s, is_complete
        if is_complete:
            return await receive()
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                message: Any = await receive()
        except TimeoutError:
            raise DeadlineError(
                f"the request's body came too slowly: less than {_LEAST_BYTES_PER_S} bytes a second "
                f"for {timeout_s:g} s",
                code="request_timeout",
                headers={"connection": "close"},
            ) from None
        left_s += len(message.get("body", b"")) / _LEAST_BYTES_PER_S
        left_s = min(timeout_s, left_s - (time.monotonic() - started_s))
        is_complete = not message.get("more_body", False)
        return message

    return receive_in_time

"""From a request for a response to what is generated: its items, its history, its call."""

from collections.abc import Sequence
from dataclasses import dataclass

from stoker.api.incoming import (
    AnyRequest,
    current_request_id,
    current_tenant,
    default_model,
    visible_headers,
)
from stoker.api.responses.answer_schemas import FunctionCallItem, Item
from stoker.api.responses.items import Turn, read_input, to_messages
from stoker.api.responses.records import KeptResponse
from stoker.api.responses.request_schemas import InputItem, InputTokensRequest, ResponseRequest
from stoker.api.responses.store import ResponseStore
from stoker.api.responses.translation import in_own_words, to_call
from stoker.api.responses.truncation import fitting
from stoker.config import Config
from stoker.errors import InvalidRequestError
from stoker.router import Call, Router

__all__ = ["Prepared", "Preparer"]

_MAX_REFERENCES = 100


@dataclass(slots=True)
class Prepared:
    """What a request for a response comes to.

    Attributes:
        call: What to generate.
        turns: The conversation that it is generated from, without the instructions.
        items: The items of the request's own input.
        warning: What had to be left out; empty if nothing had to.
    """

    call: Call
    turns: Sequence[Turn]
    items: list[Item]
    warning: str = ""


class Preparer:
    """Prepares requests for responses.

    Args:
        config: For limits.
        router: Knows the models.
        store: Has the responses that others follow.
    """

    def __init__(self, config: Config, router: Router, store: ResponseStore) -> None:
        self._config = config
        self._router = router
        self._store = store

    async def prepare(
        self, request: AnyRequest, body: ResponseRequest | InputTokensRequest
    ) -> Prepared:
        """What a request comes to.

        Raises:
            RequestError: It is malformed, follows what is not there, or names no served model.
        """
        tenant = current_tenant()
        before = await self._before(body.previous_response_id, tenant)
        items = read_input(body.input, await self._referred(body.input, tenant))
        origins = [f"input.{i}" for i in range(len(items))] if isinstance(body.input, list) else []
        turns: Sequence[Turn] = to_messages(
            [
                *(("previous_response_id", item) for item in before),
                *zip(origins or ["input"] * len(items), items, strict=True),
            ]
        )
        if not turns:
            raise InvalidRequestError(
                "'input' is empty; send a text or at least one item", param="input"
            )
        call = self._call(request, body, turns)
        warning = ""
        if body.truncation == "auto":
            left = await self._fitting(request, body, turns)
            if len(left) < len(turns):
                warning = f"truncation: the {len(turns) - len(left)} oldest messages are left out"
                turns, call = left, self._call(request, body, left)
        return Prepared(call, turns, items, warning)

    async def _before(self, response_id: str | None, tenant: str) -> list[Item]:
        """The items of all responses that come before."""
        if response_id is None:
            return []
        history = await self._store.history(response_id, tenant)
        status = history[-1].response.status
        if status in {"queued", "in_progress"}:
            raise InvalidRequestError(
                f"the previous response is {status}; wait until it is over",
                param="previous_response_id",
                code="invalid_value",
            )
        # A call that was cut off is none: its arguments are no JSON, and nothing was called.
        return [
            item
            for item in all_items(history)
            if not (isinstance(item, FunctionCallItem) and item.status == "incomplete")
        ]

    async def _referred(
        self, given: str | Sequence[InputItem] | None, tenant: str
    ) -> dict[str, Item]:
        """The stored items that items refer to, by id."""
        if given is None or isinstance(given, str):
            return {}
        wanted = {
            item.id
            for item in given
            if item.id is not None
            and (item.type == "item_reference" or (item.type is None and item.role is None))
        }
        if len(wanted) > _MAX_REFERENCES:
            raise InvalidRequestError(
                f"'input' refers to {len(wanted)} items; at most {_MAX_REFERENCES} are possible",
                param="input",
                code="invalid_value",
            )
        found = {item_id: await self._store.item(item_id, tenant) for item_id in sorted(wanted)}
        return {item_id: item for item_id, item in found.items() if item is not None}

    def _call(
        self,
        request: AnyRequest,
        body: ResponseRequest | InputTokensRequest,
        turns: Sequence[Turn],
    ) -> Call:
        with in_own_words(turns, has_instructions=bool(body.instructions)):
            return to_call(
                body,
                turns,
                self._config,
                default_model(self._router),
                current_request_id(),
                visible_headers(request),
            )

    async def _fitting(
        self,
        request: AnyRequest,
        body: ResponseRequest | InputTokensRequest,
        turns: Sequence[Turn],
    ) -> Sequence[Turn]:
        """The turns that fit into the model's context, with what is to be generated."""
        model = self._router.find(body.model or default_model(self._router)).info
        wanted = body.max_output_tokens if isinstance(body, ResponseRequest) else None
        most = min(model.context_length, model.kv_capacity_tokens) - (wanted or 1)

        async def count(some: Sequence[Turn]) -> int:
            return await self.count(self._call(request, body, some))

        with in_own_words(turns, has_instructions=bool(body.instructions)):
            return await fitting(turns, count, most)

    async def count(self, call: Call) -> int:
        """How many tokens a call's prompt has."""
        return len(await self._router.encode(call))


def all_items(history: Sequence[KeptResponse]) -> list[Item]:
    """What was said in responses that follow each other, in its order."""
    return [item for kept in history for item in (*kept.input, *kept.response.output)]

"""Responses as they are kept: structs here, JSON in the database."""

import msgspec

from stoker.api.responses.answer_schemas import Item, ResponseObject
from stoker.api.responses.database import StoredResponse

__all__ = ["KeptResponse", "from_stored", "to_stored"]

_encode = msgspec.json.Encoder().encode
_head_decoder = msgspec.json.Decoder(ResponseObject)
_items_decoder = msgspec.json.Decoder(list[Item])


class KeptResponse(msgspec.Struct, kw_only=True):
    """A response that is kept.

    Attributes:
        response: The response.
        input: Its own input's items.
        events: Its events, one after the other, if they can be asked for.
    """

    response: ResponseObject
    input: list[Item]
    events: bytes | None = None


def to_stored(kept: KeptResponse, tenant: str, owner: str | None = None) -> StoredResponse:
    """A response as the database has it.

    Args:
        kept: The response.
        tenant: Whose it is.
        owner: The process that still works on it.
    """
    response = kept.response
    return StoredResponse(
        id=response.id,
        tenant=tenant,
        previous=response.previous_response_id,
        owner=owner,
        head=_encode(msgspec.structs.replace(response, output=[])),
        input=_encode(kept.input),
        output=_encode(response.output),
        events=kept.events,
    )


def from_stored(stored: StoredResponse) -> KeptResponse:
    """The response that the database has.

    Raises:
        msgspec.MsgspecError: Its JSON is not what was once written.
    """
    response = _head_decoder.decode(stored.head)
    response.output = _items_decoder.decode(stored.output)
    return KeptResponse(
        response=response, input=_items_decoder.decode(stored.input), events=stored.events
    )

"""The served models, as Anthropic's API tells them."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from stoker.api.messages_answers import MessagesModel, MessagesModelList
from stoker.errors import InvalidRequestError
from stoker.interfaces import ServedModel

__all__ = ["list_for_anthropic", "model_for_anthropic"]

_DEFAULT_LIMIT = 20
_MAX_LIMIT = 1000


def model_for_anthropic(served: ServedModel) -> MessagesModel:
    """What is told of a model."""
    created = datetime.fromtimestamp(served.created, UTC)
    return MessagesModel(
        id=served.model_id,
        display_name=served.model_id,
        created_at=created.isoformat().replace("+00:00", "Z"),
        max_input_tokens=served.info.context_length,
        max_tokens=served.info.context_length,
    )


def list_for_anthropic(
    models: Sequence[ServedModel], query: Mapping[str, str]
) -> MessagesModelList:
    """A page of the models.

    Args:
        models: All of them.
        query: ``limit``, and ``after_id`` or ``before_id``.

    Raises:
        InvalidRequestError: The query asks for something else.
    """
    limit = _limit(query.get("limit"))
    after, before = query.get("after_id"), query.get("before_id")
    if after is not None and before is not None:
        raise _invalid(
            "'after_id' and 'before_id' exclude each other; send one of them", "after_id"
        )
    first, end = 0, len(models)
    if after is not None:
        first = _index(models, after, "after_id") + 1
    if before is not None:
        end = _index(models, before, "before_id")
        first = max(0, end - limit)
    page = models[first : min(end, first + limit)]
    return MessagesModelList(
        data=[model_for_anthropic(served) for served in page],
        has_more=first > 0 if before is not None else first + len(page) < len(models),
        first_id=page[0].model_id if page else None,
        last_id=page[-1].model_id if page else None,
    )


def _limit(given: str | None) -> int:
    if given is None:
        return _DEFAULT_LIMIT
    if given.isascii() and given.isdigit() and len(given) < 5 and 1 <= int(given) <= _MAX_LIMIT:
        return int(given)
    raise _invalid(
        f"'limit' is {given[:50]!r}; it has to be a number from 1 to {_MAX_LIMIT}", "limit"
    )


def _index(models: Sequence[ServedModel], model_id: str, param: str) -> int:
    for i, served in enumerate(models):
        if served.model_id == model_id:
            return i
    raise _invalid(f"{param!r} is {model_id[:200]!r}, which is none of the models", param)


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_value")

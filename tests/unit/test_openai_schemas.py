"""The checker of answers itself: it takes what conforms and tells where something does not."""

from __future__ import annotations

from typing import Any

import pytest

from openai_schemas import check, validator

MODEL: dict[str, Any] = {"id": "m", "object": "model", "created": 1, "owned_by": "o"}
EVENT: dict[str, Any] = {
    "type": "response.output_text.delta",
    "item_id": "msg_1",
    "output_index": 0,
    "content_index": 0,
    "delta": "In",
    "logprobs": [],
    "sequence_number": 1,
}


def test_what_conforms_passes() -> None:
    check("Model", MODEL)
    check("ListModelsResponse", {"object": "list", "data": [MODEL]})
    check("ResponseStreamEvent", EVENT)
    assert validator("ResponseStreamEvent").is_valid(EVENT)


def test_what_does_not_conform_is_told_where() -> None:
    with pytest.raises(AssertionError, match=r"no Model: \$\.created"):
        check("Model", MODEL | {"created": "today"})
    with pytest.raises(AssertionError, match=r"no ResponseTextDeltaEvent: .*sequence_number"):
        check("ResponseStreamEvent", {k: v for k, v in EVENT.items() if k != "sequence_number"})
    with pytest.raises(AssertionError, match="no ResponseStreamEvent"):
        check("ResponseStreamEvent", EVENT | {"type": "response.nonsense"})
    with pytest.raises(KeyError, match="Nonsense is not in"):
        check("Nonsense", {})


@pytest.mark.slow
def test_every_schema_is_a_schema() -> None:
    everything = validator("Response").schema
    validator("Response").check_schema(everything)
    for name in everything["$defs"]:
        check_name = validator(name)
        check_name.is_valid({})

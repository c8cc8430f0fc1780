"""Asking for responses over HTTP, with everything that comes checked against OpenAI's own schemas."""

from __future__ import annotations

import json
from typing import Any

import httpx

from openai_schemas import check

PATH = "/v1/responses"


def create(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """A response, checked."""
    body = {"input": "hi", "max_output_tokens": 5, "temperature": 0} | body
    answer = client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    response: dict[str, Any] = answer.json()
    check("Response", response)
    return response


def refused(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """The error object of a request that is refused."""
    answer = client.post(PATH, json={"input": "hi", "max_output_tokens": 5} | body)
    assert answer.status_code == 400, answer.text
    check("ErrorResponse", answer.json())
    error: dict[str, Any] = answer.json()["error"]
    return error


def decoded(text: str) -> list[dict[str, Any]]:
    """The events of a stream; checks each, and their numbers."""
    *lines, end = text.split("\n\n")
    assert end == ""
    events = []
    for line in lines:
        if line.startswith(":"):
            continue
        name, data = line.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        check("ResponseStreamEvent", event)
        events.append(event)
    first = events[0]["sequence_number"]
    numbers = [event["sequence_number"] for event in events]
    assert numbers == list(range(first, first + len(events)))
    return events


def stream(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    body = {"input": "hi", "max_output_tokens": 5, "temperature": 0, "stream": True} | body
    answer = client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return decoded(answer.text)


def text_of(response: dict[str, Any]) -> str:
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )

"""Asking the generating endpoints the same things: each answer is checked against its schema."""

from __future__ import annotations

import copy
import json
from typing import Any

import httpx
import msgspec

from openai_schemas import check

WARNING = "x-stoker-warning"
SHORT = {"temperature": 0}


class Endpoint(msgspec.Struct, frozen=True):
    """A generating endpoint.

    Attributes:
        name: The table's column.
        path: Its path.
        limit: What it calls the largest number of tokens.
        answer: OpenAI's schema of an answer; empty if it is not OpenAI's.
        event: OpenAI's schema of an event.
    """

    name: str
    path: str
    limit: str = "max_tokens"
    answer: str = ""
    event: str = ""

    def asking(self, text: str) -> dict[str, Any]:
        """The fields that ask for something."""
        if self.name == "completions":
            return {"prompt": text}
        if self.name == "responses":
            return {"input": text, "store": False}
        return {"messages": [{"role": "user", "content": text}]}

    def continuing(self, text: str) -> dict[str, Any]:
        """The fields that have a text continued."""
        if self.name == "completions":
            return {"prompt": text}
        turns = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": text}]
        return {"messages": turns} | (
            {"continue_final_message": True} if self.name == "chat" else {}
        )


CHAT = Endpoint(
    "chat",
    "/v1/chat/completions",
    answer="CreateChatCompletionResponse",
    event="CreateChatCompletionStreamResponse",
)
COMPLETIONS = Endpoint(
    "completions",
    "/v1/completions",
    answer="CreateCompletionResponse",
    event="CreateCompletionResponse",
)
RESPONSES = Endpoint(
    "responses",
    "/v1/responses",
    limit="max_output_tokens",
    answer="Response",
    event="ResponseStreamEvent",
)
MESSAGES = Endpoint("messages", "/v1/messages")
ENDPOINTS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)


class Answer:
    """An answer, whatever its shape.

    Attributes:
        body: All of it.
        texts: The text of each choice.
        calls: The tool calls: names and arguments.
        num_tokens: How many tokens were generated.
        num_prompt_tokens: How many the prompt has.
        num_cached_tokens: How many of those did not have to be computed.
        ended: Whether it ended by itself, and not because no more tokens were allowed.
    """

    def __init__(self, endpoint: Endpoint, body: dict[str, Any]) -> None:
        self.body = body
        usage = body["usage"]
        if endpoint.name in {"chat", "completions"}:
            choices = body["choices"]
            self.num_tokens = usage["completion_tokens"]
            self.num_prompt_tokens = usage["prompt_tokens"]
            self.num_cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
            self.ended = choices[0]["finish_reason"] != "length"
        if endpoint.name == "chat":
            self.texts = [choice["message"]["content"] or "" for choice in choices]
            calls = choices[0]["message"].get("tool_calls") or []
            self.calls = [
                (call["function"]["name"], json.loads(call["function"]["arguments"]))
                for call in calls
            ]
        elif endpoint.name == "completions":
            self.texts = [choice["text"] for choice in choices]
        elif endpoint.name == "responses":
            items = body["output"]
            self.texts = [
                "".join(
                    part["text"]
                    for item in items
                    if item["type"] == "message"
                    for part in item["content"]
                )
            ]
            self.calls = [
                (item["name"], json.loads(item["arguments"]))
                for item in items
                if item["type"] == "function_call"
            ]
            self.num_tokens = usage["output_tokens"]
            self.num_prompt_tokens = usage["input_tokens"]
            self.num_cached_tokens = usage["input_tokens_details"]["cached_tokens"]
            self.ended = body["status"] == "completed"
        else:
            blocks = body["content"]
            self.texts = ["".join(block["text"] for block in blocks if block["type"] == "text")]
            self.calls = [(b["name"], b["input"]) for b in blocks if b["type"] == "tool_use"]
            self.num_tokens = usage["output_tokens"]
            self.num_cached_tokens = usage["cache_read_input_tokens"]
            self.num_prompt_tokens = usage["input_tokens"] + self.num_cached_tokens
            self.ended = body["stop_reason"] != "max_tokens"

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.texts[0]


class Ask:
    """Sends requests to one endpoint; a field that is ``None`` is left out.

    Attributes:
        client: For everything else.
        log: What the server has logged.
        endpoint: Where they go.
    """

    def __init__(self, client: httpx.Client, endpoint: Endpoint, log: Any) -> None:
        self.client = client
        self.endpoint = endpoint
        self.log = log
        self._greedy: dict[str, Answer] = {}

    def body(
        self, about: str | None = None, goes_on: str | None = None, tokens: int = 8, **fields: Any
    ) -> dict[str, Any]:
        """A request: something to answer (by default a question about colors), or a text to continue."""
        asked = (
            self.endpoint.asking(about or "Name three colors.")
            if goes_on is None
            else self.endpoint.continuing(goes_on)
        )
        body = {**asked, **SHORT, self.endpoint.limit: tokens, **fields}
        return {name: value for name, value in body.items() if value is not None}

    def send(self, **fields: Any) -> httpx.Response:
        """The response to a request, whatever it is."""
        return self.client.post(self.endpoint.path, json=self.body(**fields))

    def __call__(self, **fields: Any) -> Answer:
        """An answer that nothing is wrong with."""
        response = self.send(**fields)
        assert response.status_code == 200, response.text
        assert WARNING not in response.headers, response.headers[WARNING]
        body = response.json()
        if self.endpoint.answer:
            check(self.endpoint.answer, openai_shape(body))
        return Answer(self.endpoint, body)

    def greedy(self, **fields: Any) -> str:
        """The text of a request without any options, which is asked for once."""
        key = json.dumps(fields, sort_keys=True)
        if key not in self._greedy:
            self._greedy[key] = self(**fields)
        return self._greedy[key].text

    def refused(self, status: int = 400, **fields: Any) -> str | None:
        """The parameter that a refusal names."""
        response = self.send(**fields)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        if self.endpoint.answer:
            check("ErrorResponse", response.json())
        param: str | None = error.get("param") or error.get("details", {}).get("param")
        return param

    def stream(self, **fields: Any) -> list[dict[str, Any]]:
        """The events of a stream, each checked."""
        response = self.send(stream=True, **fields)
        assert response.status_code == 200, response.text
        assert WARNING not in response.headers, response.headers[WARNING]
        lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
        if self.endpoint.name in {"chat", "completions"}:
            assert lines.pop() == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        if self.endpoint.event:
            for event in events:
                check(self.endpoint.event, openai_shape(event))
        return events

    def streamed_text(self, events: list[dict[str, Any]]) -> str:
        """What a stream's events say, put together."""
        if self.endpoint.name == "chat":
            deltas = [choice["delta"] for event in events for choice in event["choices"]]
            return "".join(delta.get("content") or "" for delta in deltas)
        if self.endpoint.name == "completions":
            return "".join(choice["text"] for event in events for choice in event["choices"])
        if self.endpoint.name == "responses":
            kind = "response.output_text.delta"
            return "".join(event["delta"] for event in events if event["type"] == kind)
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        return "".join(delta["text"] for delta in deltas)

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text."""
        answer = self.client.post("/tokenize", json={"content": text})
        ids: list[int] = answer.json()["tokens"]
        return ids


def openai_shape(body: dict[str, Any]) -> dict[str, Any]:
    """A body with what OpenAI itself sends but its schema of text completions leaves out.

    That is ``null`` for the log-probability of a text's first token, and, in a stream, for the finish reason
    before the end and for usage that comes later.
    """
    if body.get("object") != "text_completion":
        return body
    body = copy.deepcopy(body)
    if body.get("usage", {}) is None:
        del body["usage"]
    for choice in body["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        told = choice["logprobs"]
        if told and told["token_logprobs"] and told["token_logprobs"][0] is None:
            told["token_logprobs"][0] = 0.0
            told["top_logprobs"] = told["top_logprobs"] and [{}, *told["top_logprobs"][1:]]
    return body

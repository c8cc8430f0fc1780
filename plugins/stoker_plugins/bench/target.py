"""A server to measure: finding out how to speak to it, and asking it."""

from __future__ import annotations

import asyncio
import math
import random
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stoker.errors import StokerError
from stoker_plugins.bench.wire import Endpoint, Response, WireError, exchange
from stoker_plugins.bench.workload import Shot, TokensPerWord, prose, user

__all__ = ["Answer", "Target", "TargetError"]

_OPTIONAL = ("top_k", "ignore_eos", "stream_options")
_PROBE_TIMEOUT_S = 120.0  # the first answer of a cold server may take a while


class TargetError(StokerError):
    """A target cannot be measured."""


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


class Answer:
    """What came of one request. Times are of ``time.perf_counter``.

    Attributes:
        due_s: When it should have been sent; ``sent_s`` in a closed loop.
        sent_s: When it was sent.
        end_s: When it was over.
        group: Of its shot.
        asked_tokens: The most that the answer may have.
        stamps: When each event with text came.
        prompt_tokens: As the server counted; 0 if it did not say.
        completion_tokens: As the server counted; ``None`` if it did not say.
        cached_tokens: As the server counted; ``None`` if it did not say.
        finish_reason: Of the last choice; empty if it gave none.
        failure: The kind of failure; empty if the answer is complete.
        texts: The pieces of the answer, if they are to be kept.
    """

    __slots__ = (
        "asked_tokens",
        "cached_tokens",
        "completion_tokens",
        "due_s",
        "end_s",
        "failure",
        "finish_reason",
        "group",
        "is_done",
        "prompt_tokens",
        "sent_s",
        "stamps",
        "texts",
    )

    def __init__(self, shot: Shot, due_s: float | None = None, *, keep_text: bool = False) -> None:
        self.sent_s = time.perf_counter()
        self.due_s = self.sent_s if due_s is None else due_s
        self.end_s = math.nan
        self.group = shot.group
        self.asked_tokens = shot.max_tokens
        self.stamps = array("d")
        self.prompt_tokens = 0
        self.completion_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.finish_reason = ""
        self.failure = ""
        self.is_done = False
        self.texts: list[str] | None = [] if keep_text else None

    @property
    def output_tokens(self) -> int:
        """Tokens of the answer: the server's count, or else that of the events."""
        return len(self.stamps) if self.completion_tokens is None else self.completion_tokens

    def on_event(self, data: bytes, now_s: float) -> None:
        """Take one event.

        Raises:
            WireError: It is an error, or no JSON.
        """
        if data == b"[DONE]":
            self.is_done = True
            return
        try:
            event = _decode_event(data)
        except msgspec.MsgspecError as error:
            raise WireError("malformed event") from error
        if event.error is not None:
            raise WireError(f"stream error: {_error_code(event.error)}")
        for choice in event.choices:
            self._on_choice(choice, now_s)
        if (usage := event.usage) is not None:
            self.prompt_tokens = usage.prompt_tokens
            self.completion_tokens = usage.completion_tokens
            if usage.prompt_tokens_details is not None:
                self.cached_tokens = usage.prompt_tokens_details.cached_tokens

    def _on_choice(self, choice: _Choice, now_s: float) -> None:
        delta = choice.delta
        text = choice.text
        if delta is not None:
            text = delta.content or delta.reasoning_content or delta.reasoning
        if text:
            self.stamps.append(now_s)
            if self.texts is not None:
                self.texts.append(text)
        if choice.finish_reason:
            self.finish_reason = choice.finish_reason


class Target:
    """One server, one model.

    Args:
        name: In tables.
        url: Base URL.
        model: Its id; ``None`` for the first that the server lists.
        api_key: What to present.
        is_chat: Whether to use chat completions rather than completions.
        timeout_s: Longest time for one answer.

    Attributes:
        notes: What the user should know about how it is spoken to.
        server: Its ``Server`` header; empty if it sends none.
        salt: Added to the seed of its prompts, if another target is the same server and model.
    """

    def __init__(
        self,
        name: str,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        is_chat: bool = True,
        timeout_s: float = 600.0,
    ) -> None:
        self.name = name
        self.url = url
        self.model = model or ""
        self.notes: list[str] = []
        self.server = ""
        self.salt = ""
        self._is_chat = is_chat
        self._timeout_s = timeout_s
        self._endpoint = Endpoint(url, api_key)
        self._path = "/chat/completions" if is_chat else "/completions"
        self._optional: dict[str, Any] = {
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        self._dropped: set[str] = set()

    async def prepare(self, extras: Sequence[str] = ()) -> None:
        """Find the model, and which optional parameters the server takes.

        Args:
            extras: Names of the parameters that shots will have besides the usual ones.

        Raises:
            TargetError: Nothing answers, or it refuses; the message says why.
        """
        served = await self._served_models()
        if not self.model:
            if not served:
                raise TargetError(
                    f"target {self.name}: {self.url}/models lists no model; name one: "
                    f"--target {self.name}={self.url},MODEL"
                )
            self.model = served[0]
        extra = {name: 40 for name in extras if name == "top_k"}
        while True:
            response, answer = await self._probe(extra)
            if response.status == 200:
                break
            refused = self._refused_parameter(response, {**self._optional, **extra})
            if refused is None:
                raise TargetError(self._explain(response, served))
            self._optional.pop(refused, None)
            extra.pop(refused, None)
            self._dropped.add(refused)
            self.notes.append(f"does not take {refused}: sent without it")
        if answer.failure:
            raise TargetError(f"target {self.name}: the first answer failed: {answer.failure}")
        if not answer.stamps:
            raise TargetError(
                f"target {self.name}: {self.url}{self._path} streams no text; is it an OpenAI API?"
            )
        if answer.completion_tokens is None:
            self.notes.append("reports no usage: its events are counted as tokens")

    async def measure_words(self) -> TokensPerWord:
        """How its tokenizer counts our words; one token for each if it does not say."""
        rng = random.Random("words")
        counts = []
        for num_words in (8, 104):
            answer = await self.ask(Shot((user(prose(rng, num_words)),), 1))
            if answer.failure or not answer.prompt_tokens:
                self.notes.append("does not count prompt tokens: one word is taken for one token")
                return TokensPerWord()
            counts.append((num_words, answer.prompt_tokens))
        return TokensPerWord.measured(*counts)

    async def ask(
        self, shot: Shot, due_s: float | None = None, *, keep_text: bool = False
    ) -> Answer:
        """Send a request and time its answer. Failures are in the answer.

        Args:
            shot: What to send.
            due_s: When it should have been sent; ``None`` for now.
            keep_text: Whether to keep the answer's text.
        """
        body = self.body(shot)
        answer = Answer(shot, due_s, keep_text=keep_text)
        await self._send(body, answer)
        return answer

    def body(self, shot: Shot) -> bytes:
        """The request's JSON."""
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": shot.max_tokens,
            "temperature": 0,
            "stream": True,
            **self._optional,
            **{name: value for name, value in shot.extra.items() if name not in self._dropped},
        }
        if self._is_chat:
            fields["messages"] = shot.messages
        else:
            fields["prompt"] = "\n\n".join(message["content"] for message in shot.messages)
        return msgspec.json.encode(fields)

    async def _send(self, body: bytes, answer: Answer) -> Response | None:
        response = None
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await exchange(self._endpoint, self._path, body, answer)
        except TimeoutError:
            answer.failure = "timeout"
        except WireError as error:
            answer.failure = str(error)
        answer.end_s = time.perf_counter()
        if response is None:
            return None
        if response.status != 200:
            answer.failure = f"http {response.status}{_code_of(response)}"
        elif not (answer.is_done or answer.finish_reason):
            answer.failure = "cut short" if answer.stamps else "no stream"
        elif not answer.stamps:
            answer.failure = "no text"
        return response

    async def _get(self, path: str) -> Response:
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                return await exchange(self._endpoint, path, None)
        except TimeoutError as error:
            raise TargetError(f"target {self.name}: {self.url} does not answer in time") from error
        except WireError as error:
            hint = "; is the server running?" if "refused" in str(error) else ""
            raise TargetError(f"target {self.name}: {self.url}: {error}{hint}") from error

    async def _served_models(self) -> list[str]:
        response = await self._get("/models")
        self.server = response.headers.get("server", "")
        if response.status in (401, 403):
            raise TargetError(self._explain(response, []))
        if response.status != 200:
            return []
        try:
            listed = msgspec.json.decode(response.body)["data"]
            return [str(model["id"]) for model in listed]
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            raise TargetError(
                f"target {self.name}: {self.url}/models is not the OpenAI API; the URL should be the "
                "base URL, such as http://127.0.0.1:8000/v1"
            ) from error

    async def _probe(self, extra: Mapping[str, Any]) -> tuple[Response, Answer]:
        shot = Shot((user("Say something."),), 4, extra=extra)
        answer = Answer(shot)
        response = await self._send(self.body(shot), answer)
        if response is None:
            raise TargetError(f"target {self.name}: {self.url}{self._path}: {answer.failure}")
        return response, answer

    def _refused_parameter(self, response: Response, sent: Mapping[str, Any]) -> str | None:
        """The optional parameter to leave out next: the one that the refusal names, or the first."""
        if response.status not in (400, 422):
            return None
        text = response.body.decode("utf-8", "replace")
        candidates = [name for name in _OPTIONAL if name in sent]
        named = [name for name in candidates if name in text]
        return next(iter(named or candidates), None)

    def _explain(self, response: Response, served: list[str]) -> str:
        try:
            error = msgspec.json.decode(response.body)["error"]
            said = error["message"] if isinstance(error, dict) else str(error)
        except (msgspec.MsgspecError, KeyError, TypeError):
            said = response.body[:200].decode("utf-8", "replace").strip()
        text = f"target {self.name}: the server answered {response.status}: {said}"
        if response.status in (401, 403):
            return f"{text} (--api-key presents a key)"
        if served and self.model not in served:
            return f"{text} (it lists {', '.join(served[:10])})"
        return text


def _code_of(response: Response) -> str:
    """What an OpenAI error body calls itself, with a space before it; nothing if it is none."""
    try:
        return f" {_error_code(msgspec.json.decode(response.body)['error'])}"
    except (msgspec.MsgspecError, KeyError, TypeError):
        return ""


def _error_code(error: Any) -> str:
    """The most stable name of an error in an OpenAI error object."""
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or error.get("message") or "unknown")[:60]
    return str(error)[:60]

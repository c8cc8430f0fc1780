"""What is computed before anybody asks: pinned system prompts, and the prompts of warm-up files.

Everything is checked when the server is assembled, so that a mistake stops the start. Then, once requests are
taken, each prompt is computed as a request of its own, one after the other and for a single token: what
stays behind is its KV. Users' requests run beside them, and are urgent by comparison.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from stoker.api.request_schemas import ChatMessage, ChatRequest, CompletionRequest
from stoker.api.validation import chat_calls, completion_calls
from stoker.calls import Call, RoutedModel, make_request
from stoker.config import AdmissionConfig, Config
from stoker.decoding import did_you_mean
from stoker.errors import ConfigError, RequestError, UnavailableError
from stoker.tenants import ANONYMOUS, is_tenant_name
from stoker.types import Request

__all__ = ["WarmUp", "WarmUpLine", "read_warm_up"]

logger = logging.getLogger("stoker.cache")

_LAST = 2**31 - 1  # the least urgent priority
_NO_TIMEOUTS = AdmissionConfig(queue_timeout_s=0.0, request_timeout_s=0.0)
# What users may begin with. The prompts that a pin is the beginning of agree in what comes before.
_USERS = ("a", "0", "\n\n", "The")


class WarmUpLine(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A line of a warm-up file.

    Attributes:
        messages: A conversation; a line has either this or ``prompt``.
        prompt: Text to continue, as in ``/v1/completions``.
        model: The id of the model that computes it; by default every model that writes text does.
        tenant: Whose it is.
        cache_salt: Only requests with the same salt find it.
    """

    messages: list[ChatMessage] | None = None
    prompt: str | None = None
    model: str | None = None
    tenant: str | None = None
    cache_salt: str = ""


class _Job(NamedTuple):
    """A prompt that is to be computed.

    Attributes:
        where: Where it stands, for messages.
        model: Who computes it.
        request: The request.
        pin: The tokens of it that are to be kept.
    """

    where: str
    model: RoutedModel
    request: Request
    pin: Sequence[int] = ()


def read_warm_up(config: Config) -> list[tuple[str, WarmUpLine]]:
    """The lines of the warm-up files, checked as far as that goes without a model, each with its place.

    Raises:
        ConfigError: A file cannot be read, or a line of it is wrong.
    """
    lines = []
    for index, name in enumerate(config.cache.warm_up):
        where, path = f"cache.warm_up[{index}]", Path(name).expanduser()
        try:
            texts = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: {path} cannot be read: {error}") from error
        found = [
            (place, _read_line(place, text, config.cache.isolation))
            for place, text in ((f"{where}: {path}, line {n}", t) for n, t in enumerate(texts, 1))
            if text.strip()
        ]
        if not found:
            raise ConfigError(
                f"{where}: {path} holds no prompt; write one JSON object on each line"
            )
        lines += found
    return lines


def _read_line(where: str, text: str, isolation: str) -> WarmUpLine:
    try:
        line = msgspec.json.decode(text, type=WarmUpLine)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{where}: {error}") from error
    if (line.messages is None) == (line.prompt is None):
        raise ConfigError(f"{where}: give either `messages` or `prompt`")
    if line.tenant is not None and not is_tenant_name(line.tenant):
        raise ConfigError(f"{where}: {line.tenant[:64]!r} is no name of a tenant")
    if line.tenant is None and isolation == "tenant":
        raise ConfigError(
            f'{where}: name its `tenant`: under cache.isolation = "tenant" nobody else could use it'
        )
    return line


class WarmUp:
    """Pins and warm-up files.

    Args:
        config: ``[cache] pin``.
        lines: What ``read_warm_up`` returned.
        models: The served models.
        clock: Monotonic seconds; the same as the engine's.

    Attributes:
        num_pins: Pinned prompts, once for each model.
        num_prompts: Prompts of files, once for each model.
        is_done: Whether all of them were computed, or given up.

    Raises:
        ConfigError: A model refuses one of the prompts, only embeds, or is not served.
    """

    def __init__(
        self,
        config: Config,
        lines: Iterable[tuple[str, WarmUpLine]],
        models: Sequence[RoutedModel],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._models = models
        self._writing = [model for model in models if _generates(model)]
        if config.cache.pin and not self._writing:
            raise ConfigError("cache.pin: no model that is served writes text; leave it out")
        self._clock = clock
        jobs = [
            self._pinned(f"cache.pin[{index}]", model, text)
            for index, text in enumerate(config.cache.pin)
            for model in self._writing
        ]
        self.num_pins = len(jobs)
        jobs += [
            _Job(where, model, self._request(where, model, line))
            for where, line in lines
            for model in self._models_of(where, line)
        ]
        self.num_prompts = len(jobs) - self.num_pins
        self._jobs = jobs
        self._task: asyncio.Task[None] | None = None
        self.is_done = not jobs

    @property
    def summary(self) -> str:
        """What it does, for people; empty if that is nothing."""
        if not self._jobs:
            return ""
        pinned = f", {self.num_pins} of them pinned" if self.num_pins else ""
        what = "prompt is" if len(self._jobs) == 1 else "prompts are"
        return f"{len(self._jobs)} {what} computed{pinned}; /ready waits for them"

    # ------------------------------------------------------------------ checking

    def _pinned(self, where: str, model: RoutedModel, text: str) -> _Job:
        """A system prompt: what all conversations under it begin with."""
        encoded = []
        for user in _USERS:
            messages = [
                ChatMessage(role="system", content=text),
                ChatMessage(role="user", content=user),
            ]
            encoded.append(self._request(where, model, WarmUpLine(messages=messages)))
        prompts = [request.prompt_token_ids for request in encoded]
        return _Job(where, model, encoded[0], _common(prompts))

    def _models_of(self, where: str, line: WarmUpLine) -> Iterable[RoutedModel]:
        if line.model is None:
            if not self._writing:
                raise ConfigError(f"{where}: no model that is served writes text")
            return self._writing
        found = [model for model in self._models if model.served.model_id == line.model]
        if not found:
            ids = [model.served.model_id for model in self._models]
            raise ConfigError(
                f"{where}: the model {line.model[:200]!r} is not served."
                f"{did_you_mean(line.model, ids)} Served: {', '.join(ids)}."
            )
        if not _generates(found[0]):
            raise ConfigError(
                f"{where}: the model {line.model!r} only embeds; name one that writes text"
            )
        return found

    def _request(self, where: str, model: RoutedModel, line: WarmUpLine) -> Request:
        """The request that a user would make of it, as far as its tokens go."""
        try:
            call = self._call(model, line)
            prompt = _encode(model, call)
            request = make_request(
                model, call, prompt, priority=_LAST, now_s=0.0, admission=_NO_TIMEOUTS
            )
        except RequestError as error:
            raise ConfigError(f"{where}: model {model.served.model_id}: {error}") from error
        request.tenant = ANONYMOUS if line.tenant is None else line.tenant
        return request

    def _call(self, model: RoutedModel, line: WarmUpLine) -> Call:
        name = model.served.model_id
        if line.messages is not None:
            chat = ChatRequest(
                messages=line.messages, max_tokens=1, temperature=0.0, cache_salt=line.cache_salt
            )
            return chat_calls(chat, self._config, name, "warm-up", {})[0]
        completion = CompletionRequest(
            prompt=line.prompt or "", max_tokens=1, temperature=0.0, cache_salt=line.cache_salt
        )
        return completion_calls(completion, self._config, name, "warm-up", {})[0]

    # ------------------------------------------------------------------ computing

    async def start(self) -> None:
        """Begin, on the running event loop."""
        if not self.is_done and self._task is None:
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Break off."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        started_s = self._clock()
        num_computed = num_tokens = 0
        try:
            for number, job in enumerate(self._jobs, start=1):
                job.request.request_id = f"warm-up-{number}"
                error = await self._compute(job)
                if error is None:
                    num_computed += 1
                    num_tokens += len(job.request.prompt_token_ids)
                else:
                    logger.warning("%s could not be computed: %s", job.where, error)
            logger.info(
                "warmed up: %d of %d prompts, %d tokens in %.1f s",
                num_computed,
                len(self._jobs),
                num_tokens,
                self._clock() - started_s,
            )
        except UnavailableError:
            logger.info("the warm-up was broken off: the server stops")
        finally:
            self.is_done = True

    async def _compute(self, job: _Job) -> Exception | None:
        """Compute a prompt; returns what went wrong."""
        if job.pin:
            job.model.client.pin(job.pin)
        job.request.arrival_s = self._clock()
        stream = job.model.client.submit(job.request)
        try:
            async for batch in stream:
                for delta in batch:
                    if delta.error is not None:
                        return delta.error
        finally:
            stream.abort()
        return None


def _generates(model: RoutedModel) -> bool:
    return model.client.info.capabilities.generates


def _encode(model: RoutedModel, call: Call) -> list[int]:
    """The call's prompt as token ids: what ``encode_prompt`` does, but at once."""
    if call.messages is not None:
        return model.template.encode(call.messages)
    return model.client.tokenizer.encode(
        str(call.prompt or ""), add_special=True, parse_special=True
    )


def _common(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The longest common prefix."""
    common = []
    for tokens in zip(*prompts, strict=False):
        if len(set(tokens)) > 1:
            break
        common.append(tokens[0])
    return common

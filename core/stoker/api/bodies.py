"""Whole answers of chat and text completions."""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from stoker.api.answer_schemas import (
    ChatChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    ResponseMessage,
)
from stoker.api.choices import Choice
from stoker.api.events import StreamShape
from stoker.api.logprobs import CompletionLogprobsBuilder, chat_logprobs, prompt_logprobs_body
from stoker.api.run import Run
from stoker.types import TokenLogprob

__all__ = ["chat_body", "completion_body"]

_encode = msgspec.json.Encoder().encode


def chat_body(
    run: Run, shape: StreamShape, choices: Sequence[Choice], metadata: dict[str, str] | None
) -> bytes:
    """The body of a chat completion.

    Args:
        run: What it came from.
        shape: What is to be in it.
        choices: Its choices.
        metadata: What the request was labelled with.
    """
    answer = ChatCompletion(
        **_head(run, shape, metadata),
        choices=[_chat_choice(index, choice, shape) for index, choice in enumerate(choices)],
        usage=run.usage(),
    )
    if shape.token_ids:
        answer.prompt_token_ids = run.prompt_token_ids(0)
    if shape.prompt_logprobs and choices[0].prompt_logprobs is not None:
        answer.prompt_logprobs = prompt_logprobs_body(choices[0].prompt_logprobs)
    return _encode(answer)


def _head(run: Run, shape: StreamShape, metadata: dict[str, str] | None) -> dict[str, Any]:
    return {
        "id": shape.response_id,
        "created": shape.created,
        "model": run.model,
        "system_fingerprint": shape.fingerprint,
        "service_tier": shape.service_tier or UNSET,
        "metadata": metadata or UNSET,
        "timings": run.timings() if shape.timings else UNSET,
    }


def _chat_choice(index: int, choice: Choice, shape: StreamShape) -> ChatChoice:
    text = choice.text
    message = ResponseMessage(content=text if text or not choice.calls else None)
    if choice.reasoning:
        message.reasoning_content = "".join(choice.reasoning)
    if choice.calls:
        message.tool_calls = choice.calls
    reason: Any = choice.finish_reason
    return ChatChoice(
        index=index,
        message=message,
        logprobs=None if shape.logprobs is None else chat_logprobs(choice.logprobs),
        finish_reason=reason,
        stop_reason=UNSET if choice.stop is None else choice.stop,
        token_ids=choice.token_ids if shape.token_ids else UNSET,
    )


def completion_body(
    run: Run,
    shape: StreamShape,
    choices: Sequence[Choice],
    metadata: dict[str, str] | None,
    per_prompt: int,
) -> bytes:
    """The body of a text completion.

    Args:
        run: What it came from.
        shape: What is to be in it.
        choices: The choices that were generated.
        metadata: What the request was labelled with.
        per_prompt: How many choices the client gets for each prompt: the likeliest of them.
    """
    answered: list[CompletionChoice] = []
    for group in _groups(run, choices):
        prompt_logprobs = choices[group[0]].prompt_logprobs
        best = group
        if per_prompt < len(group):
            best = sorted(group, key=lambda at: choices[at].mean_logprob, reverse=True)
        for at in best[:per_prompt]:
            choice = _completion_choice(run, at, choices[at], shape, prompt_logprobs)
            choice.index = len(answered)
            answered.append(choice)
    answer = Completion(**_head(run, shape, metadata), choices=answered, usage=run.usage())
    return _encode(answer)


def _groups(run: Run, choices: Sequence[Choice]) -> list[list[int]]:
    """The indices of the choices of each prompt."""
    groups: dict[int, list[int]] = {}
    for index in range(len(choices)):
        groups.setdefault(run.prompt_index(index), []).append(index)
    return list(groups.values())


def _completion_choice(
    run: Run,
    index: int,
    choice: Choice,
    shape: StreamShape,
    prompt_logprobs: Sequence[TokenLogprob | None] | None,
) -> CompletionChoice:
    echo = shape.echo[index] if shape.echo else ""
    reason: Any = choice.finish_reason
    answer = CompletionChoice(
        index=index,
        text=echo + choice.text,
        logprobs=_completion_logprobs(choice, shape, prompt_logprobs, echo),
        finish_reason=reason,
        stop_reason=UNSET if choice.stop is None else choice.stop,
    )
    if shape.token_ids:
        answer.token_ids = choice.token_ids
        answer.prompt_token_ids = run.prompt_token_ids(index)
    if shape.prompt_logprobs and prompt_logprobs is not None:
        answer.prompt_logprobs = prompt_logprobs_body(prompt_logprobs)
    return answer


def _completion_logprobs(
    choice: Choice,
    shape: StreamShape,
    prompt_logprobs: Sequence[TokenLogprob | None] | None,
    echo: str,
) -> CompletionLogprobs | None:
    if shape.logprobs is None:
        return None
    echoed = list(prompt_logprobs or ()) if shape.echo else []
    rest = "".join(item.data.decode("utf-8", "ignore") for item in echoed if item is not None)
    first = echo[: max(0, len(echo) - len(rest))]
    return CompletionLogprobsBuilder(0).build([*echoed, *choice.logprobs], first)

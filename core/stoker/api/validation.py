"""Decoded bodies into ``Call``s: what can be checked and normalised without knowing the model."""

from collections.abc import Mapping
from typing import Any

from stoker.api.schemas import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest
from stoker.config import Config
from stoker.errors import InvalidRequestError
from stoker.router import Call
from stoker.types import SamplingParams

__all__ = ["chat_calls", "completion_calls", "includes_usage"]

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
_MAX_STOP_STRINGS = 4
_OFF = SamplingParams()


def chat_calls(
    body: ChatRequest, config: Config, model: str, request_id: str, headers: Mapping[str, str]
) -> list[Call]:
    """The call that a chat request asks for.

    Args:
        body: The request.
        config: For ``max_n``.
        model: The default model.
        request_id: Its id.
        headers: What middleware may see.

    Raises:
        InvalidRequestError: Something is wrong with it.
    """
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.max_tokens not in {None, limit}:
        raise InvalidRequestError(
            "'max_tokens' and 'max_completion_tokens' differ; send one of them",
            param="max_completion_tokens",
        )
    messages = [_message(message, f"messages.{i}") for i, message in enumerate(body.messages)]
    call = _call(body, config, model, request_id, headers, limit)
    call.endpoint = "chat"
    call.messages = messages
    return [call]


def completion_calls(
    body: CompletionRequest, config: Config, model: str, request_id: str, headers: Mapping[str, str]
) -> list[Call]:
    """The calls that a completion request asks for, one for each prompt.

    Raises:
        InvalidRequestError: Something is wrong with it.
    """
    prompts = _prompts(body.prompt)
    num_sequences = len(prompts) * (body.n or 1)
    most = config.admission.max_queue_requests
    if num_sequences > most:
        raise InvalidRequestError(
            f"{num_sequences} answers were requested at once; at most {most} are possible",
            param="prompt",
        )
    calls = []
    for i, prompt in enumerate(prompts):
        call_id = request_id if len(prompts) == 1 else f"{request_id}-{i}"
        call = _call(body, config, model, call_id, headers, body.max_tokens)
        call.prompt = prompt
        call.group = request_id
        calls.append(call)
    return calls


def includes_usage(body: GenerationRequest) -> bool:
    """Whether a stream ends with the token counts.

    Raises:
        InvalidRequestError: There are stream options but no stream.
    """
    if body.stream_options is None:
        return False
    if not body.stream:
        raise InvalidRequestError(
            "'stream_options' is only allowed when 'stream' is true", param="stream_options"
        )
    return bool(body.stream_options.include_usage)


def _call(
    body: GenerationRequest,
    config: Config,
    model: str,
    request_id: str,
    headers: Mapping[str, str],
    max_tokens: int | None,
) -> Call:
    n = 1 if body.n is None else body.n
    if n > config.admission.max_n:
        raise InvalidRequestError(
            f"'n' is {n}; this server allows at most {config.admission.max_n}",
            param="n",
            code="invalid_value",
        )
    return Call(
        request_id=request_id,
        model=model if body.model is None else body.model,
        sampling=_sampling(body, max_tokens),
        n=n,
        priority=body.priority,
        timeout_s=body.timeout,
        cache_salt=body.cache_salt or "",
        headers=headers,
    )


def _sampling(body: GenerationRequest, max_tokens: int | None) -> SamplingParams:
    def given(name: str) -> Any:
        value = getattr(body, name)
        return getattr(_OFF, name) if value is None else value

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=given("temperature"),
        top_p=given("top_p"),
        top_k=max(0, given("top_k")),
        min_p=given("min_p"),
        repetition_penalty=given("repetition_penalty"),
        presence_penalty=given("presence_penalty"),
        frequency_penalty=given("frequency_penalty"),
        logit_bias=_logit_bias(body.logit_bias or {}),
        seed=body.seed,
        stop=_stop(body.stop),
        ignore_eos=bool(body.ignore_eos),
    )


def _logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    for token in bias:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise InvalidRequestError(
                f"'logit_bias' names {token[:50]!r}; its keys are token ids such as \"42\"",
                param="logit_bias",
                code="invalid_value",
            )
    return {int(token): value for token, value in bias.items()}


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > _MAX_STOP_STRINGS:
        raise InvalidRequestError(
            f"'stop' has {len(strings)} strings; at most {_MAX_STOP_STRINGS} are possible",
            param="stop",
            code="invalid_value",
        )
    if "" in strings:
        raise InvalidRequestError(
            "'stop' holds an empty string; remove it", param="stop", code="invalid_value"
        )
    return strings


# --------------------------------------------------------------------------- messages


def _message(message: ChatMessage, where: str) -> dict[str, Any]:
    """A message as chat templates want it."""
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequestError(
            f"unknown role {message.role[:50]!r}; use one of {', '.join(_ROLES)}",
            param=f"{where}.role",
            code="invalid_value",
        )
    result = {"role": role, "content": _content(message, where)}
    for name in ("name", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            result[name] = _text(value, f"{where}.{name}")
    return result


def _content(message: ChatMessage, where: str) -> str:
    content, where = message.content, f"{where}.content"
    if isinstance(content, str):
        return _text(content, where)
    if content is None:
        if message.role == "assistant":
            return ""
        raise InvalidRequestError(
            f"{where!r} is missing; only an assistant's content may be null",
            param=where,
            code="missing_required_parameter",
        )
    texts = []
    for i, part in enumerate(content):
        if part.type != "text":
            raise InvalidRequestError(
                f"content parts of type {part.type[:50]!r} are not supported; only 'text' is",
                param=f"{where}.{i}",
                code="invalid_value",
            )
        if part.text is None:
            raise InvalidRequestError(
                f"'{where}.{i}.text' is missing",
                param=f"{where}.{i}.text",
                code="missing_required_parameter",
            )
        texts.append(_text(part.text, f"{where}.{i}.text"))
    return "\n".join(texts)


# --------------------------------------------------------------------------- prompts


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """One prompt, or several: text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [_text(prompt, "prompt", empty=False)]
    if not prompt:
        raise _empty("prompt")
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [_token_ids(ids, "prompt")]
    prompts: list[str | list[int]] = []
    for i, item in enumerate(prompt):
        where = f"prompt.{i}"
        if isinstance(item, str):
            prompts.append(_text(item, where, empty=False))
        elif isinstance(item, list):
            prompts.append(_token_ids(item, where))
        else:
            raise InvalidRequestError(
                "'prompt' mixes token ids with other prompts; send one list of token ids, or a list "
                "of strings or of lists of token ids",
                param=where,
                code="invalid_type",
            )
    return prompts


def _token_ids(ids: list[int], where: str) -> list[int]:
    if not ids:
        raise _empty(where)
    for token in ids:
        if not 0 <= token < 2**31:
            raise InvalidRequestError(
                f"{where!r} holds {token}, which is not a token id",
                param=where,
                code="invalid_value",
            )
    return ids


def _text(text: str, where: str, *, empty: bool = True) -> str:
    if not text and not empty:
        raise _empty(where)
    if "\0" in text:
        raise InvalidRequestError(
            f"{where!r} holds a NUL character; remove it", param=where, code="invalid_value"
        )
    return text


def _empty(where: str) -> InvalidRequestError:
    return InvalidRequestError(f"{where!r} is empty", param=where, code="invalid_value")

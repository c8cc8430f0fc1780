"""Decoded bodies into ``Call``s: what can be checked and normalised without knowing the model."""

from collections.abc import Mapping
from typing import Any

import msgspec

from stoker.api.conversation import (
    check_text,
    join_parts,
    read_messages,
    read_tool_choice,
    read_tools,
)
from stoker.api.request_schemas import ChatRequest, CompletionRequest, GenerationRequest, Prediction
from stoker.api.shapes import read_grammar
from stoker.config import Config
from stoker.errors import InvalidRequestError
from stoker.router import Call
from stoker.types import SamplingParams

__all__ = ["chat_calls", "completion_calls", "includes_usage", "tier_of"]

_MAX_STOP_STRINGS = 4
_OFF = SamplingParams()
_SAME_NAME = (
    *("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty"),
    *(
        "frequency_penalty",
        "dry_multiplier",
        "dry_base",
        "dry_allowed_length",
        "dry_penalty_last_n",
    ),
    *("xtc_probability", "xtc_threshold", "min_tokens", "prompt_logprobs"),
)
_TIERS = {"auto": 0, "default": 0, "flex": 10, "scale": 0, "priority": -10}
_NO_REASONING = {"none", "minimal"}


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
    if body.top_logprobs is not None and not body.logprobs:
        raise _invalid("'top_logprobs' is only allowed when 'logprobs' is true", "top_logprobs")
    messages = read_messages(body.messages)
    call = _call(body, config, model, request_id, headers, limit)
    call.endpoint = "chat"
    call.messages = messages
    if body.logprobs:
        call.sampling = msgspec.structs.replace(call.sampling, logprobs=body.top_logprobs or 0)
    call.tools = read_tools(body.tools)
    call.tool_choice = read_tool_choice(
        body.tool_choice, call.tools, parallel=body.parallel_tool_calls
    )
    call.template_options = _template_options(body)
    call.continue_final_message = bool(body.continue_final_message)
    if body.add_generation_prompt is None:
        call.add_generation_prompt = not call.continue_final_message
    else:
        call.add_generation_prompt = body.add_generation_prompt
    _check_continuation(call)
    if body.prediction is not None:
        call.prediction = _prediction(body.prediction)
    return [call]


def _check_continuation(call: Call) -> None:
    if not call.continue_final_message:
        return
    if call.add_generation_prompt:
        raise _invalid(
            "'continue_final_message' and 'add_generation_prompt' exclude each other; send one of them",
            "continue_final_message",
        )
    if call.messages and call.messages[-1]["role"] != "assistant":
        raise _invalid(
            "'continue_final_message' needs an assistant's message at the end of 'messages'",
            "continue_final_message",
        )


def _template_options(body: ChatRequest) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        options["reasoning_effort"] = body.reasoning_effort
        options["enable_thinking"] = body.reasoning_effort not in _NO_REASONING
    return options | (body.chat_template_kwargs or {})


def _prediction(prediction: Prediction) -> str:
    if prediction.type != "content":
        raise _invalid(
            f"'prediction.type' is {prediction.type[:50]!r}; it has to be content",
            "prediction.type",
        )
    if isinstance(prediction.content, str):
        return check_text(prediction.content, "prediction.content")
    return join_parts(prediction.content, "prediction.content")


def completion_calls(
    body: CompletionRequest, config: Config, model: str, request_id: str, headers: Mapping[str, str]
) -> list[Call]:
    """The calls that a completion request asks for, one for each prompt.

    Raises:
        InvalidRequestError: Something is wrong with it.
    """
    prompts = _prompts(body.prompt)
    num_sequences = len(prompts) * _num_candidates(body, config)
    most = config.admission.max_queue_requests
    if num_sequences > most:
        raise InvalidRequestError(
            f"{num_sequences} answers were requested at once; at most {most} are possible",
            param="prompt",
        )
    _check_completion(body)
    calls = []
    for i, prompt in enumerate(prompts):
        call_id = request_id if len(prompts) == 1 else f"{request_id}-{i}"
        call = _call(body, config, model, call_id, headers, body.max_tokens)
        call.prompt = prompt
        call.group = request_id
        call.n = _num_candidates(body, config)
        call.suffix = None if body.suffix is None else check_text(body.suffix, "suffix")
        call.sampling = msgspec.structs.replace(call.sampling, **_completion_logprobs(body))
        calls.append(call)
    return calls


def _num_candidates(body: CompletionRequest, config: Config) -> int:
    n, best_of = body.n or 1, body.best_of
    if best_of is None:
        return n
    if best_of > config.admission.max_n:
        raise _invalid(
            f"'best_of' is {best_of}; this server allows at most {config.admission.max_n}",
            "best_of",
        )
    if best_of < n:
        raise _invalid(f"'best_of' is {best_of}, less than 'n', which is {n}", "best_of")
    return best_of


def _completion_logprobs(body: CompletionRequest) -> dict[str, int]:
    """What must be told of tokens, for the answer or to choose among candidates."""
    wanted = {}
    if body.logprobs is not None:
        wanted["logprobs"] = body.logprobs
        if body.echo:
            wanted["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    elif body.best_of is not None and body.best_of > (body.n or 1):
        wanted["logprobs"] = 0
    return wanted


def _check_completion(body: CompletionRequest) -> None:
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise _invalid(
            "'max_tokens' is 0, so there is nothing to answer; ask for 'echo' or 'prompt_logprobs'",
            "max_tokens",
        )
    if body.best_of is not None and body.stream and body.best_of > (body.n or 1):
        raise _invalid("'best_of' cannot be streamed: the best is known at the end only", "best_of")
    if body.suffix is not None and body.echo:
        raise _invalid("'suffix' and 'echo' exclude each other; send one of them", "suffix")


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
    return bool(body.stream_options.include_usage or body.stream_options.continuous_usage_stats)


def tier_of(body: GenerationRequest) -> str:
    """The service tier of the answer; empty if none was asked for."""
    asked = body.service_tier or ""
    return asked if _TIERS.get(asked) else "default" if asked else ""


# --------------------------------------------------------------------------- both


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
        raise _invalid(f"'n' is {n}; this server allows at most {config.admission.max_n}", "n")
    return Call(
        request_id=request_id,
        model=model if body.model is None else body.model,
        sampling=_sampling(body, max_tokens),
        n=n,
        priority=_priority(body),
        timeout_s=body.timeout,
        cache_salt=body.cache_salt or "",
        headers=headers,
        grammar=read_grammar(body),
        wants_token_ids=bool(body.return_token_ids),
        wants_progress=bool(body.return_progress and body.stream),
        user=body.safety_identifier or body.user or "",
        metadata=body.metadata or {},
    )


def _priority(body: GenerationRequest) -> int | None:
    if body.service_tier is None:
        return body.priority
    if body.service_tier not in _TIERS:
        raise _invalid(
            f"'service_tier' is {body.service_tier[:50]!r}; use one of {', '.join(_TIERS)}",
            "service_tier",
        )
    return body.priority if body.priority is not None else _TIERS[body.service_tier] or None


def _sampling(body: GenerationRequest, max_tokens: int | None) -> SamplingParams:
    given = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    if max_tokens is not None and given.get("min_tokens", 0) > max_tokens:
        raise _invalid(
            f"'min_tokens' is {body.min_tokens}, more than may be generated, which is {max_tokens}",
            "min_tokens",
        )
    breakers = body.dry_sequence_breakers
    return SamplingParams(
        max_tokens=max_tokens,
        top_k=max(0, body.top_k or 0),
        dry_sequence_breakers=_OFF.dry_sequence_breakers if breakers is None else tuple(breakers),
        logit_bias=_logit_bias(body.logit_bias or {}),
        seed=body.seed,
        stop=_stop(body.stop),
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids or ())),
        include_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        **given,
    )


def _logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    for token in bias:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise _invalid(
                f"'logit_bias' names {token[:50]!r}; its keys are token ids such as \"42\"",
                "logit_bias",
            )
    return {int(token): value for token, value in bias.items()}


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > _MAX_STOP_STRINGS:
        raise _invalid(
            f"'stop' has {len(strings)} strings; at most {_MAX_STOP_STRINGS} are possible", "stop"
        )
    if "" in strings:
        raise _invalid("'stop' holds an empty string; remove it", "stop")
    return strings


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_value")


# --------------------------------------------------------------------------- prompts


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """One prompt, or several: text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [check_text(prompt, "prompt", empty=False)]
    if not prompt:
        raise _empty("prompt")
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [_token_ids(ids, "prompt")]
    prompts: list[str | list[int]] = []
    for i, item in enumerate(prompt):
        where = f"prompt.{i}"
        if isinstance(item, str):
            prompts.append(check_text(item, where, empty=False))
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
            raise _invalid(f"{where!r} holds {token}, which is not a token id", where)
    return ids


def _empty(where: str) -> InvalidRequestError:
    return _invalid(f"{where!r} is empty", where)

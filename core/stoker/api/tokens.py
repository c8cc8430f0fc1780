"""``/tokenize``, ``/detokenize``, ``/apply-template``, ``/tokenizer_info``: a model's tokens and prompts."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec
from litestar import get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromQuery
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from stoker.api.body import BodyDecoder
from stoker.api.incoming import AnyRequest, current_request_id, default_model, visible_headers
from stoker.api.openapi import body_operation, json_operation
from stoker.api.parameters import CHAT_FIELDS, KnownFields, check_parameters
from stoker.api.request_schemas import ChatRequest
from stoker.api.token_schemas import (
    AppliedTemplate,
    Detokenization,
    DetokenizeRequest,
    Tokenization,
    TokenizeRequest,
    TokenizerInfo,
    TokenPiece,
)
from stoker.api.validation import chat_calls
from stoker.config import Config
from stoker.errors import InvalidRequestError
from stoker.interfaces import ServedModel, Tokenizer
from stoker.router import Call, Router

__all__ = ["token_routes"]

T = TypeVar("T")

_TOKENIZE_FIELDS = KnownFields.of(
    TokenizeRequest,
    within={name: CHAT_FIELDS.within[name] for name in ("messages", "tools")},
    unsupported=("chat_template", "mm_processor_kwargs"),
)
_DETOKENIZE_FIELDS = KnownFields.of(DetokenizeRequest)
_ONLY_WITH_MESSAGES = (
    *("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
)
_OFF_THREAD = 20_000  # characters or tokens that would hold up the event loop

_tokenize_decoder = BodyDecoder(TokenizeRequest)
_detokenize_decoder = BodyDecoder(DetokenizeRequest)
_chat_decoder = BodyDecoder(ChatRequest)


def token_routes(config: Config, router: Router) -> list[HTTPRouteHandler]:
    """The handlers of these endpoints.

    Args:
        config: Limits and strictness.
        router: What knows the models.
    """
    return [
        _tokenize(config, router),
        _detokenize(config, router),
        _apply_template(config, router),
        _tokenizer_info(router),
    ]


def _tokenize(config: Config, router: Router) -> HTTPRouteHandler:
    @post(
        "/tokenize",
        status_code=200,
        summary="The tokens of a text, or of the prompt that messages become",
        tags=["tokens"],
        operation_id="tokenize",
        operation_class=body_operation("TokenizeRequest", "Tokenization"),
    )
    async def tokenize(request: AnyRequest) -> ASGIApp:
        check = partial(check_parameters, known=_TOKENIZE_FIELDS, strict=config.server.strict)
        body, headers = await _tokenize_decoder.read(request, config.server.max_body_bytes, check)
        text, add_special = _what_to_tokenize(body)
        served = _served(router, body.model)
        tokenizer = router.tokenizer(served.model_id)
        tokens: list[int]
        if body.messages is not None:
            given = {name: getattr(body, name) for name in _ONLY_WITH_MESSAGES}
            chat = ChatRequest(model=served.model_id, messages=body.messages, **given)
            tokens = await router.encode(_call(config, router, chat, request))
        else:
            parse = body.parse_special is not False
            encode = partial(tokenizer.encode, text, add_special=add_special, parse_special=parse)
            tokens = await _at_leisure(encode, len(text))

        def write() -> bytes:
            return msgspec.json.encode(
                Tokenization(
                    tokens=_pieces(tokenizer, tokens) if body.with_pieces else list(tokens),
                    count=len(tokens),
                    max_model_len=served.info.context_length,
                    token_strs=_strings(tokenizer, tokens) if body.return_token_strs else None,
                )
            )

        return _json(await _at_leisure(write, len(tokens)), headers)

    return tokenize


def _detokenize(config: Config, router: Router) -> HTTPRouteHandler:
    @post(
        "/detokenize",
        status_code=200,
        summary="The text of tokens",
        tags=["tokens"],
        operation_id="detokenize",
        operation_class=body_operation("DetokenizeRequest", "Detokenization"),
    )
    async def detokenize(request: AnyRequest) -> ASGIApp:
        check = partial(check_parameters, known=_DETOKENIZE_FIELDS, strict=config.server.strict)
        body, headers = await _detokenize_decoder.read(request, config.server.max_body_bytes, check)
        served = _served(router, body.model)
        tokenizer = router.tokenizer(served.model_id)
        decode = partial(_text_of, tokenizer, body.tokens, served.info.vocab_size)
        text = await _at_leisure(decode, len(body.tokens))
        return _json(msgspec.json.encode(Detokenization(prompt=text, content=text)), headers)

    return detokenize


def _apply_template(config: Config, router: Router) -> HTTPRouteHandler:
    @post(
        "/apply-template",
        status_code=200,
        summary="The prompt that messages become, as text; takes what a chat completion takes",
        tags=["tokens"],
        operation_id="apply_template",
        operation_class=body_operation("ChatRequest", "AppliedTemplate"),
    )
    async def apply_template(request: AnyRequest) -> ASGIApp:
        check = partial(check_parameters, known=CHAT_FIELDS, strict=config.server.strict)
        body, headers = await _chat_decoder.read(request, config.server.max_body_bytes, check)
        prompt = await router.render(_call(config, router, body, request))
        return _json(msgspec.json.encode(AppliedTemplate(prompt=prompt)), headers)

    return apply_template


def _tokenizer_info(router: Router) -> HTTPRouteHandler:
    @get(
        "/tokenizer_info",
        summary="The tokenizer of a model",
        tags=["tokens"],
        operation_id="tokenizer_info",
        operation_class=json_operation("TokenizerInfo"),
    )
    async def tokenizer_info(model: FromQuery[str | None] = None) -> ASGIApp:
        served = _served(router, model)
        info = TokenizerInfo(
            model=served.model_id,
            bos_token=served.info.bos_token or None,
            eos_token=served.info.eos_token or None,
            chat_template=served.info.chat_template,
            model_max_length=served.info.context_length,
            vocab_size=served.info.vocab_size,
        )
        return _json(msgspec.json.encode(info), {})

    return tokenizer_info


def _served(router: Router, model: str | None) -> ServedModel:
    return router.find(default_model(router) if model is None else model)


def _call(config: Config, router: Router, body: ChatRequest, request: AnyRequest) -> Call:
    """The call that a chat completion would be."""
    (call,) = chat_calls(
        body, config, default_model(router), current_request_id(), visible_headers(request)
    )
    return call


def _what_to_tokenize(body: TokenizeRequest) -> tuple[str, bool]:
    """The text, and whether to add the tokens around it; the text is empty if it is messages.

    Raises:
        InvalidRequestError: There is not exactly one thing to tokenize, or options contradict each other.
    """
    given = [name for name in ("prompt", "content", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        what = f"{' and '.join(map(repr, given))} are given" if given else "none is given"
        raise InvalidRequestError(
            f"send one of 'prompt', 'content' and 'messages'; {what}",
            param=given[1] if given else "prompt",
            code="invalid_value" if given else "missing_required_parameter",
        )
    wishes = {body.add_special_tokens, body.add_special} - {None}
    if len(wishes) == 2:
        raise InvalidRequestError(
            "'add_special_tokens' and 'add_special' differ; send one of them",
            param="add_special",
            code="invalid_value",
        )
    if given == ["messages"]:
        for name in ("add_special_tokens", "add_special", "parse_special"):
            if getattr(body, name):
                raise InvalidRequestError(
                    f"{name!r} has no meaning with 'messages': their template writes the control tokens",
                    param=name,
                    code="invalid_value",
                )
        return "", False
    for name in _ONLY_WITH_MESSAGES:
        if getattr(body, name):
            raise InvalidRequestError(
                f"{name!r} has a meaning with 'messages' only", param=name, code="invalid_value"
            )
    text = body.prompt if body.prompt is not None else body.content or ""
    return text, wishes.pop() is True if wishes else given == ["prompt"]


async def _at_leisure(work: Callable[[], T], size: int) -> T:
    """What ``work`` returns; done on another thread if it is long."""
    return work() if size < _OFF_THREAD else await asyncio.to_thread(work)


def _text_of(tokenizer: Tokenizer, tokens: Sequence[int], vocab_size: int) -> str:
    for i, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(
                f"'tokens.{i}' is {token}, which is not in the vocabulary of {vocab_size} tokens",
                param=f"tokens.{i}",
                code="invalid_value",
            )
    control = _control_tokens(tokenizer)
    data = b"".join(_bytes_of(tokenizer, token, control) for token in tokens)
    return data.decode("utf-8", "replace")


def _bytes_of(tokenizer: Tokenizer, token: int, control: dict[int, str]) -> bytes:
    return control[token].encode() if token in control else tokenizer.token_bytes(token)


def _control_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    return {token: text for text, token in tokenizer.special_tokens.items()}


def _strings(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    control = _control_tokens(tokenizer)
    return [_bytes_of(tokenizer, token, control).decode("utf-8", "replace") for token in tokens]


def _pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int | TokenPiece]:
    control = _control_tokens(tokenizer)
    return [
        TokenPiece(id=token, piece=_text_or_bytes(_bytes_of(tokenizer, token, control)))
        for token in tokens
    ]


def _text_or_bytes(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def _json(body: bytes, headers: dict[str, str]) -> ASGIApp:
    return ASGIResponse(body=body, media_type="application/json", headers=headers)

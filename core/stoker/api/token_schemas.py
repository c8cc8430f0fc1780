"""The bodies of ``/tokenize``, ``/detokenize`` and ``/apply-template``."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from stoker.api.request_schemas import ChatMessage, ToolParam

__all__ = [
    "AppliedTemplate",
    "Detokenization",
    "DetokenizeRequest",
    "TokenPiece",
    "Tokenization",
    "TokenizeRequest",
    "TokenizerInfo",
]


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of ``POST /tokenize``: exactly one of ``prompt``, ``content`` and ``messages``.

    Attributes:
        model: A served model's id; by default the first served model.
        prompt: Text, with the tokens that the model wants around it, as in vLLM.
        content: Text, without them, as in llama-server.
        messages: A conversation: the tokens of the prompt that it becomes. With it the next four go as in a
            chat completion.
        tools: The functions that the model may call.
        chat_template_kwargs: More names for the chat template.
        add_generation_prompt: Whether the prompt ends with the beginning of an answer; it does by default.
        continue_final_message: Go on where the last message, an assistant's, ends.
        add_special_tokens: Whether to add the tokens that the model wants around a text.
        add_special: The same, in llama-server's words.
        parse_special: Whether the text of control tokens becomes those tokens; by default it does.
        with_pieces: Whether ``tokens`` are objects that hold the token's text, as in llama-server.
        return_token_strs: Whether to answer with ``token_strs``.
    """

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[ToolParam] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None
    return_token_strs: bool | None = None


class TokenPiece(msgspec.Struct, kw_only=True):
    """A token: its text, or its bytes where those are only a part of a character."""

    id: int
    piece: str | list[int]


class Tokenization(msgspec.Struct, kw_only=True):
    """The answer of ``POST /tokenize``.

    Attributes:
        tokens: Token ids; with ``with_pieces`` objects.
        count: How many.
        max_model_len: Most tokens of prompt and answer together.
        token_strs: The text of each token; bytes that are no characters by themselves become U+FFFD.
    """

    tokens: list[int | TokenPiece]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of ``POST /detokenize``.

    Attributes:
        model: A served model's id; by default the first served model.
        tokens: Token ids.
    """

    model: str | None = None
    tokens: Annotated[list[int], Meta(examples=[[72, 105]])]


class Detokenization(msgspec.Struct, kw_only=True):
    """The answer of ``POST /detokenize``: the text, in the words of vLLM and of llama-server."""

    prompt: str
    content: str


class AppliedTemplate(msgspec.Struct, kw_only=True):
    """The answer of ``POST /apply-template``: the text of the prompt that the messages become."""

    prompt: str


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """The answer of ``GET /tokenizer_info``, in vLLM's words; evaluation harnesses ask for it.

    Attributes:
        model: The model.
        bos_token: The text of the token that texts begin with; ``null`` if there is none.
        eos_token: The text of the token that ends an answer; ``null`` if there is none.
        chat_template: The Jinja template that comes with the model; ``null`` if none does.
        model_max_length: Most tokens of prompt and answer together.
        vocab_size: How many tokens there are.
    """

    model: str
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None
    model_max_length: int
    vocab_size: int

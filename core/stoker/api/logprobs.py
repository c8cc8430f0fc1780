"""Log-probabilities of tokens in the words of the different endpoints."""

from collections.abc import Iterable
from typing import Any

from stoker.api.answer_schemas import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    TopLogprob,
)
from stoker.types import TokenLogprob

__all__ = ["CompletionLogprobsBuilder", "chat_logprobs", "prompt_logprobs_body", "token_text"]


def token_text(data: bytes) -> str:
    """A token's text; part of a character as OpenAI writes it: ``bytes:`` and its bytes in hexadecimal."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(logprobs: Iterable[TokenLogprob]) -> ChatLogprobs:
    """Log-probabilities in the words of chat completions."""
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=token_text(item.data),
                logprob=item.logprob,
                bytes=list(item.data),
                top_logprobs=[
                    TopLogprob(
                        token=token_text(top.data), logprob=top.logprob, bytes=list(top.data)
                    )
                    for top in item.top
                ],
            )
            for item in logprobs
        ]
    )


class CompletionLogprobsBuilder:
    """Log-probabilities in the words of text completions: offsets count characters from the text's start.

    Args:
        offset: Where the first token stands.
    """

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def build(self, logprobs: Iterable[TokenLogprob | None], first: str = "") -> CompletionLogprobs:
        """The log-probabilities of the next tokens.

        Args:
            logprobs: In their order; ``None`` for a token that nothing predicts.
            first: The text of such a token.
        """
        tokens, values, tops, offsets = [], [], [], []
        for item in logprobs:
            text = first if item is None else token_text(item.data)
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text if item is None else item.data.decode("utf-8", "ignore"))
            values.append(None if item is None else item.logprob)
            tops.append(None if item is None else _top_dict(item))
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=values,
            top_logprobs=tops,
            text_offset=offsets,
        )


def _top_dict(item: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens and the one that is there, as OpenAI has it."""
    found = {token_text(top.data): top.logprob for top in item.top}
    found.setdefault(token_text(item.data), item.logprob)
    return found


def prompt_logprobs_body(
    logprobs: Iterable[TokenLogprob | None],
) -> list[dict[str, Any] | None]:
    """The prompt's log-probabilities in vLLM's words: by token id."""
    return [None if item is None else _by_id(item) for item in logprobs]


def _by_id(item: TokenLogprob) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rank, top in enumerate(item.top, 1):
        found[str(top.token_id)] = {
            "logprob": top.logprob,
            "rank": rank,
            "decoded_token": token_text(top.data),
        }
    found.setdefault(
        str(item.token_id), {"logprob": item.logprob, "decoded_token": token_text(item.data)}
    )
    return found

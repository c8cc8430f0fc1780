"""For authors of tool formats: grammars tried over bytes, and parsers fed in pieces."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import llguidance

from stoker.pieces import CallPiece, OutputParser, Piece, ReasoningPiece, TextPiece

__all__ = ["ByteVocabulary", "read_output"]


class ByteVocabulary:
    """A vocabulary of the 256 bytes, an end token and control tokens, to try grammars with.

    Args:
        special: The texts of the control tokens.

    Attributes:
        special_tokens: Their ids by their text: what ``ToolFormat.grammar`` gets.
        end: The end token.
    """

    # What llguidance asks of a tokenizer, under its own names.
    bos_token_id = None
    eos_token_id = 256
    end = 256

    def __init__(self, special: Sequence[str] = ()) -> None:
        self.special_tokens = {text: self.end + 1 + i for i, text in enumerate(special)}
        self.tokens = [bytes([i]) for i in range(256)]
        self.tokens += [b"\xff" + name.encode() for name in ("<end>", *special)]
        self.special_token_ids = list(range(self.end, len(self.tokens)))
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(self))

    def __call__(self, data: bytes) -> list[int]:
        """Tokens of forced text, for llguidance."""
        return list(data)

    def encode(self, text: str) -> list[int]:
        """Bytes, and control tokens where the text has theirs."""
        tokens: list[int] = []
        while text:
            name = next((name for name in self.special_tokens if text.startswith(name)), None)
            if name is None:
                tokens += text[0].encode()
                text = text[1:]
            else:
                tokens.append(self.special_tokens[name])
                text = text[len(name) :]
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of an output, control tokens shown."""
        names = {token: text.encode() for text, token in self.special_tokens.items()}
        pieces = (names[t] if t in names else bytes([t]) for t in tokens)
        return b"".join(pieces).decode("utf-8", "replace")

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher of this grammar.

        Raises:
            ValueError: It does not compile; says why.
        """
        matcher = llguidance.LLMatcher(self._tokenizer, grammar)
        if matcher.is_error():
            raise ValueError(f"{matcher.get_error()}\n{grammar}")
        return matcher

    def accepts(self, grammar: str, text: str) -> bool:
        """Whether the whole text is a possible output."""
        matcher, tokens = self.matcher(grammar), self.encode(text)
        if matcher.validate_tokens(tokens) < len(tokens):
            return False
        return (not tokens or matcher.consume_tokens(tokens)) and matcher.is_accepting()

    def write(self, grammar: str, seed: int, limit: int = 400) -> tuple[str, bool]:
        """What a model without any sense writes under a grammar, and whether it came to an end.

        Args:
            grammar: The grammar.
            seed: Another one gives another output.
            limit: Most tokens.
        """
        matcher, chance = self.matcher(grammar), random.Random(seed)
        tokens: list[int] = []
        while len(tokens) < limit and not matcher.is_stopped():
            token = self._choose(matcher.compute_logit_bias(), chance)
            if token == self.end:
                return self.decode(tokens), True
            tokens.append(token)
            matcher.consume_token(token)
        return self.decode(tokens), matcher.is_stopped()

    def _choose(self, bias: bytes, chance: random.Random) -> int:
        """A token that may come next: a readable one, and often one that closes something."""
        possible = [token for token in range(len(self.tokens)) if bias[token]]
        readable = [t for t in possible if 32 <= t < 127 or t == 10 or t >= self.end]
        closing = [t for t in readable if t in {10, *b"}\"',])"} or t == self.end]
        if closing and chance.random() < 0.3:
            return chance.choice(closing)
        return chance.choice(readable or possible)


def read_output(parser: OutputParser, parts: Iterable[str]) -> list[Piece]:
    """All pieces of an output; those that continue one another are put together.

    Args:
        parser: A fresh parser.
        parts: The output's text, cut anywhere.
    """
    found: list[Piece] = []
    for part in parts:
        found += parser.push(part)
    found += parser.finish()
    joined: list[Piece] = []
    for piece in found:
        together = _join(joined[-1], piece) if joined else None
        if together is None:
            joined.append(piece)
        else:
            joined[-1] = together
    return joined


def _join(first: Piece, second: Piece) -> Piece | None:
    """Both in one, if the second continues the first."""
    match first, second:
        case CallPiece(), CallPiece(name=""):
            return CallPiece(first.index, first.arguments + second.arguments, first.name)
        case TextPiece(), TextPiece():
            return TextPiece(first.text + second.text)
        case ReasoningPiece(), ReasoningPiece():
            return ReasoningPiece(first.text + second.text)
    return None

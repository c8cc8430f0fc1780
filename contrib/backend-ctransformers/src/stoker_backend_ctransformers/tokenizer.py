"""Text to token ids and back, by the vocabulary inside the file.

ggml's examples cut text into words and take the longest token that fits, again and again: their files
hold no merges. ctransformers does so with ``std::regex``, which overflows the stack on a long word and takes
quadratic time, so the same is done here. Only llama's and falcon's vocabularies, which have scores and
merges, use ctransformers' own functions.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING

from stoker import EngineError, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stoker_backend_ctransformers.legacy_file import LegacyFile
    from stoker_backend_ctransformers.native import Instance

__all__ = ["LegacyTokenizer"]

# GPT-2's pattern, over bytes: letters and digits are ASCII ones, as in the C locale. That is what ggml's
# examples do (examples/common.cpp, 2023), so it is what such files are used with.
_WORDS = re.compile(
    rb"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
)
_MARKUP = re.compile(rb"<\|[^<>|\s\x80-\xff]{1,64}\|>")
_CONTROL = frozenset(
    b"<s> </s> <unk> <pad> [PAD] <fim-prefix> <fim-middle> <fim-suffix> <fim-pad> <fim_prefix> <fim_middle> "
    b"<fim_suffix> <fim_pad>".split()
) | {b"### End", b"### Instruction:", b"### Response:"}
_ENDS = (b"<|endoftext|>", b"</s>", b"<|end|>", b"<|end_of_turn|>", b"<|im_end|>", b"### End")
_LLAMA = {0: "<unk>", 1: "<s>", 2: "</s>"}  # files hold an empty text, or an odd one
_NUL_OF_LLAMA = 3


class LegacyTokenizer(Tokenizer):
    """The tokenizer of a file.

    Args:
        file: What the file says.
        instance: A loaded model, for vocabularies that need one, until ``close``.

    Attributes:
        end_token_ids: Tokens that end a generation.
        bos_token: The text of the token that begins one; empty if there is none.
        eos_token: The text of the usual end token; empty if there is none.
        num_missing_bytes: How many of the 256 bytes no token stands for; text made of them is left out.
    """

    def __init__(self, file: LegacyFile, instance: Instance | None) -> None:
        self._pieces = list(file.tokens)
        self._instance = instance
        self._lock = threading.Lock()
        self._native = file.architecture.tokenizer == "native"
        self._is_llama = file.architecture.name == "llama"
        self._special = self._find_special()
        self._by_text = {text.encode(): token for text, token in self._special.items()}
        for token in self._special.values():
            self._pieces[token] = b""
        self._ids = {piece: token for token, piece in enumerate(self._pieces) if piece}
        self._longest = _longest_by_first_byte(self._ids)
        self._control = re.compile(
            b"|".join(map(re.escape, sorted(self._by_text, key=len, reverse=True))) or b"(?!)"
        )
        missing = sum(bytes([byte]) not in self._ids for byte in range(256))
        self.num_missing_bytes = 0 if self._native else missing
        self.bos_token, self.eos_token, self.end_token_ids = self._find_ends()

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens by their text."""
        return self._special

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text``; lone surrogates become ``?``.

        Args:
            text: Any text.
            add_special: Begin with the token that the model wants there (llama's BOS).
            parse_special: Turn the text of control tokens into those tokens.

        Raises:
            EngineError: The model is closed.
        """
        data = text.encode("utf-8", "replace")
        bos = self._special[self.bos_token] if self._is_llama and self.bos_token else None
        tokens = [bos] if add_special and bos is not None else []
        if add_special and self._is_llama:
            data = (
                b" " + data
            )  # SentencePiece begins every text so; ctransformers leaves it to its caller
        if not parse_special:
            return tokens + self._encode_text(data)
        position = 0
        for match in self._control.finditer(data):
            tokens += self._encode_text(data[position : match.start()])
            tokens.append(self._by_text[match.group()])
            position = match.end()
        return tokens + self._encode_text(data[position:])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the output; empty for control tokens."""
        return self._pieces[token_id]

    def close(self) -> None:
        """Let go of the model, after which ``encode`` may raise ``EngineError``."""
        with self._lock:
            self._instance = None

    # ------------------------------------------------------------------ encoding

    def _encode_text(self, data: bytes) -> list[int]:
        if not data:
            return []
        if self._native:
            return self._encode_natively(data)
        ids, longest = self._ids, self._longest
        tokens = []
        for match in _WORDS.finditer(data):
            start, end = match.span()
            while start < end:
                for stop in range(min(end, start + longest[data[start]]), start, -1):
                    token = ids.get(data[start:stop])
                    if token is not None:
                        tokens.append(token)
                        start = stop
                        break
                else:
                    start += 1  # no token has this byte
        return tokens

    def _encode_natively(self, data: bytes) -> list[int]:
        tokens: list[int] = []
        # C strings end at the first NUL. Calls wait for each other: nothing says that they need not.
        for index, part in enumerate(data.split(b"\0")):
            if index and self._is_llama and len(self._pieces) > _NUL_OF_LLAMA:
                tokens.append(_NUL_OF_LLAMA)
            with self._lock:
                if self._instance is None:
                    raise EngineError("the model of this tokenizer is closed")
                tokens += self._instance.tokenize(part, add_bos=False) if part else []
        return tokens

    # ------------------------------------------------------------------ the vocabulary

    def _find_special(self) -> dict[str, int]:
        special = {
            piece.decode(): token
            for token, piece in enumerate(self._pieces)
            if piece in _CONTROL or _MARKUP.fullmatch(piece)
        }
        if self._is_llama:
            special |= {text: token for token, text in _LLAMA.items() if token < len(self._pieces)}
        return special

    def _find_ends(self) -> tuple[str, str, frozenset[int]]:
        ends = [text.decode() for text in _ENDS if text in self._by_text]
        ids = {self._special[text] for text in ends}
        eos = ends[0] if ends else ""
        if self._native and not self._is_llama and self._instance is not None:
            ids.add(self._instance.eos_token_id)
            ids = {token for token in ids if 0 <= token < len(self._pieces)}
        bos = "<s>" if self._is_llama else eos
        return (bos if bos in self._special else ""), eos, frozenset(ids)


def _longest_by_first_byte(tokens: Iterable[bytes]) -> list[int]:
    longest = [0] * 256
    for token in tokens:
        longest[token[0]] = max(longest[token[0]], len(token))
    return longest

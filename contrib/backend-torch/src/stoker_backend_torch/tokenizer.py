"""Text to token ids and back, by the ``tokenizers`` library under transformers' fast tokenizers.

Two copies of the model's tokenizer are made from its JSON description, and neither is ever changed: changing
one while another thread encodes is an error in that library. ``marked`` turns the text of control tokens into
those tokens, ``plain`` keeps it text. Truncation, padding and random merges (dropout) are left out of both.
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Any

import msgspec
from tokenizers import Tokenizer as NativeTokenizer

import stoker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["TorchTokenizer"]

# Some vocabularies hold markup ("<tool_call>") as added tokens that are not marked as special.
_MARKUP = re.compile(r"<[^<>\s]+>")
# HTML elements are text that users may write, and such vocabularies were trained to see them as tokens.
_HTML = re.compile(
    r"</?(a|b|blockquote|body|br|caption|code|dd|div|dl|dt|em|h[1-6]|head|hr|html|i|img|li|ol|p|pre|s|span|"
    r"strong|sub|sup|table|tbody|td|tfoot|th|thead|tr|u|ul)/?>"
)
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # sentencepiece's mark for a space
_SAMPLE = "a"


class TorchTokenizer(stoker.Tokenizer):
    """A fast tokenizer behind stoker's interface; safe to call from several threads.

    Args:
        description: The tokenizer's JSON description (the content of a ``tokenizer.json``).

    Attributes:
        vocab_size: Token ids are below it; a model may have more logits, whose tokens have no text.

    Raises:
        ModelError: The description makes no sense, or it adds tokens within a text.
    """

    def __init__(self, description: str) -> None:
        parts = msgspec.json.decode(description, type=dict[str, Any])
        parts["truncation"] = parts["padding"] = None
        if parts["model"].get("dropout"):
            parts["model"]["dropout"] = None
        added = {token["id"]: token for token in parts["added_tokens"]}
        self._special = {
            token["content"]: index for index, token in added.items() if _is_control(token)
        }
        self._special_ids = frozenset(self._special.values())
        self._added: dict[int, bytes] = {
            index: token["content"].encode("utf-8", "replace")
            for index, token in added.items()
            if index not in self._special_ids
        }
        self._marked = _build(parts)
        self._plain = _build(_without_control(parts, self._special))
        self._plain.encode_special_tokens = True  # as text; the last change to it
        # There may be holes between their numbers.
        self.vocab_size = 1 + max(
            self._marked.get_vocab(with_added_tokens=True).values(), default=-1
        )
        self._ids_before, self._ids_after = _wrapping(self._marked)
        self._piece = _piece_reader(parts)
        self._pieces: dict[int, bytes] = {}
        self._adds_space = self._decode_raw(self._encode_raw(_SAMPLE)).startswith(b" ")

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens by their text, and added ones that look like markup but HTML's."""
        return self._special

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text``; lone surrogates become ``?``.

        Args:
            text: Any text.
            add_special: Add the tokens the model wants around a text (BOS, ...).
            parse_special: Turn the text of the tokens in ``special_tokens`` into them.
        """
        native = self._marked if parse_special else self._plain
        try:
            ids: list[int] = native.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # what the library says of a lone surrogate
            text = text.encode("utf-8", "replace").decode()
            ids = native.encode(text, add_special_tokens=False).ids
        return [*self._ids_before, *ids, *self._ids_after] if add_special else ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the output; empty for control tokens and ids without a token.

        Words of WordPiece vocabularies begin with a space: where there was one is not in their tokens.
        """
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._make_piece(token_id)
        return piece

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of ``token_ids``, without the space that the tokenizer puts before a text's first word."""
        data = self._decode_raw(token_ids)
        if self._adds_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def _encode_raw(self, text: str) -> list[int]:
        return self.encode(text, add_special=False, parse_special=False)

    def _decode_raw(self, token_ids: Iterable[int]) -> bytes:
        return b"".join(map(self.token_bytes, token_ids))

    def _make_piece(self, token_id: int) -> bytes:
        if token_id in self._special_ids:
            return b""
        if token_id in self._added:
            return self._added[token_id]
        token: str | None = self._marked.id_to_token(token_id)
        return b"" if token is None else self._piece(token)


# --------------------------------------------------------------------------- encoding


def _is_control(token: Mapping[str, Any]) -> bool:
    text = token["content"]
    if not text:
        return False
    return bool(token["special"]) or bool(_MARKUP.fullmatch(text) and not _HTML.fullmatch(text))


def _build(parts: Mapping[str, Any]) -> NativeTokenizer:
    try:
        return NativeTokenizer.from_str(msgspec.json.encode(parts).decode())
    except Exception as error:  # the library raises no type of its own
        raise stoker.ModelError(f"the tokenizer cannot be built: {error}") from error


def _without_control(parts: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
    """The description of a tokenizer for which the text of control tokens is text like any other.

    It must not look for them in a text, and its model must not build them either: in vocabularies that
    come from sentencepiece they are pieces like all others. There they get names that nobody can write.
    """
    added = [
        {**token, "special": token["special"] or token["content"] in special}
        for token in parts["added_tokens"]
    ]
    model = dict(parts["model"])
    hidden = {text: f"<{secrets.token_hex(16)}>" for text in special}
    hidden.pop(model.get("unk_token") or "", None)
    vocab: Any = model.get("vocab")
    if model.get("merges") is not None:
        if _can_build(model, hidden.keys()):
            model["merges"] = [
                merge for merge in model["merges"] if hidden.keys().isdisjoint(_merged(merge))
            ]
            model["vocab"] = _renamed(vocab, hidden)
    elif isinstance(vocab, dict):
        model["vocab"] = _renamed(vocab, hidden)
    elif isinstance(vocab, list):
        model["vocab"] = [[hidden.get(text, text), score] for text, score in vocab]
    return {**parts, "added_tokens": added, "model": model}


def _renamed(vocab: Mapping[str, int], names: Mapping[str, str]) -> dict[str, int]:
    return {names.get(text, text): index for text, index in vocab.items()}


def _can_build(model: Mapping[str, Any], texts: Iterable[str]) -> bool:
    """Whether byte-pair encoding can come upon tokens of these texts by itself."""
    wanted = set(texts) & model["vocab"].keys()
    if not wanted:
        return False
    if model.get("ignore_merges"):
        return True
    return any(not wanted.isdisjoint(_merged(merge)) for merge in model["merges"])


def _merged(merge: str | list[str]) -> tuple[str, str, str]:
    """A merge's two parts and what it makes of them."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right


def _wrapping(native: NativeTokenizer) -> tuple[list[int], list[int]]:
    """The tokens that are added before and after a text."""
    bare: list[int] = native.encode(_SAMPLE, add_special_tokens=False).ids
    whole: list[int] = native.encode(_SAMPLE, add_special_tokens=True).ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise stoker.ModelError("the tokenizer adds tokens within a text, which is not supported")


# --------------------------------------------------------------------------- pieces


def _piece_reader(parts: Mapping[str, Any]) -> Callable[[str], bytes]:
    """How a vocabulary's spelling of a token becomes its bytes, by the tokenizer's decoder."""
    steps = list(_flatten(parts.get("decoder")))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level_piece
    if "WordPiece" in kinds:
        prefix = next(step["prefix"] for step in steps if step["type"] == "WordPiece")
        return lambda token: _word_piece(token, prefix)
    if "BPEDecoder" in kinds:
        suffix = next(step["suffix"] for step in steps if step["type"] == "BPEDecoder")
        return lambda token: _with_suffix(token, suffix)
    if not steps:  # the library joins such tokens by spaces
        return lambda token: b" " + token.encode("utf-8", "replace")
    replacements = [
        (step["replacement"], " ") if step["type"] == "Metaspace" else _replacement(step)
        for step in steps
        if step["type"] == "Metaspace" or _replacement(step)[0]
    ]
    has_bytes = "ByteFallback" in kinds
    return lambda token: _plain_piece(token, replacements, has_bytes=has_bytes)


def _flatten(decoder: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _flatten(step)
    else:
        yield decoder


def _replacement(step: Mapping[str, Any]) -> tuple[str, str]:
    """What a step replaces, and by what; nothing where it is of another kind."""
    if step["type"] != "Replace":
        return "", ""
    return step["pattern"].get("String", ""), step["content"]


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's ``encoder.py``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes(map(_ALPHABET.__getitem__, token))
    except KeyError:  # no token of that alphabet: a text
        return token.encode("utf-8", "replace")


def _word_piece(token: str, prefix: str) -> bytes:
    if token.startswith(prefix):
        return token.removeprefix(prefix).encode("utf-8", "replace")
    return b" " + token.encode("utf-8", "replace")


def _with_suffix(token: str, suffix: str) -> bytes:
    if suffix and token.endswith(suffix):
        token = token.removesuffix(suffix) + " "
    return token.encode("utf-8", "replace")


def _plain_piece(token: str, replacements: Iterable[tuple[str, str]], *, has_bytes: bool) -> bytes:
    match = _BYTE.fullmatch(token) if has_bytes else None
    if match is not None:
        return bytes([int(match[1], 16)])
    for old, new in replacements:
        token = token.replace(old, new)
    return token.encode("utf-8", "replace")

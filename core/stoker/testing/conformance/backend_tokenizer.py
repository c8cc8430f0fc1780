"""The backend suite: text to tokens and back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from stoker.interfaces import Runtime, Tokenizer
from stoker.testing.conformance.backend_base import BackendSuite
from stoker.testing.conformance.base import check
from stoker.testing.conformance.subjects import BackendUnderTest

__all__ = ["BackendTokenizer"]

_MAX_PIECES = 4096


class BackendTokenizer(BackendSuite):
    """Texts come back as they were, and no text of a user becomes a control token."""

    def test_texts_come_back(self, backend: BackendUnderTest, runtime: Runtime) -> None:
        """A text is not what its tokens decode to.

        To fix: ``token_bytes`` gives the very bytes a token stands for, also parts of characters; no
        normalising, no clean-up of spaces. One space that a vocabulary puts before a text is allowed.
        """
        if not runtime.info.capabilities.generates:
            pytest.skip("the model only embeds: its tokenizer need not keep texts")
        for text in (*backend.texts, *backend.hard_texts):
            tokens = _encode(runtime.tokenizer, text)
            found = runtime.tokenizer.decode(tokens)
            check(
                found == text or found == f" {text}",
                f"{text!r} became {len(tokens)} tokens and then {found!r}",
                "Look at encode() and token_bytes(), or leave out of hard_texts what cannot be written.",
            )

    def test_token_ids_are_in_range(self, backend: BackendUnderTest, runtime: Runtime) -> None:
        """``encode`` gives what is no token id, or ``token_bytes`` no bytes.

        To fix: plain ints below ``vocab_size``; every id has bytes, control tokens and padding have none.
        """
        size = runtime.info.vocab_size
        for text in (*backend.texts, *backend.hard_texts):
            for special in (False, True):
                tokens = runtime.tokenizer.encode(text, add_special=special, parse_special=special)
                wrong = [t for t in tokens if not isinstance(t, int) or not 0 <= t < size]
                check(not wrong, f"encode({text!r}) gave {wrong[:5]!r}; vocab_size is {size}")
        for token in range(0, size, max(1, size // _MAX_PIECES)):
            piece = runtime.tokenizer.token_bytes(token)
            check(isinstance(piece, bytes), f"token_bytes({token}) is {piece!r}, not bytes")
        for text, token in runtime.tokenizer.special_tokens.items():
            piece = runtime.tokenizer.token_bytes(token)
            check(
                piece == b"", f"token_bytes of the control token {text!r} is {piece!r}, not empty"
            )

    def test_user_text_becomes_no_control_token(self, runtime: Runtime) -> None:
        """With ``parse_special=False`` the text of a control token becomes the token: users could fake turns.

        To fix: encode such text as ordinary characters; with ``parse_special=True`` it is the token.
        """
        special = runtime.tokenizer.special_tokens
        if not special:
            pytest.skip("the model has no control tokens")
        ids = set(special.values())
        for text, token in list(special.items())[:64]:
            for around in (text, f"hello {text} there", f"{text}{text}"):
                tokens = _encode(runtime.tokenizer, around)
                check(
                    not ids & set(tokens),
                    f"{around!r} became {tokens} with parse_special=False: the control token {token}",
                    "Split control tokens' texts before the vocabulary sees them, or switch that off.",
                )
            parsed = runtime.tokenizer.encode(text, add_special=False, parse_special=True)
            check(
                token in parsed,
                f"{text!r} became {parsed} with parse_special=True, without the control token {token}",
                "Chat templates write control tokens as text: they must be parsed there.",
            )

    def test_the_tokenizer_serves_several_threads(
        self, backend: BackendUnderTest, runtime: Runtime
    ) -> None:
        """Encoding in several threads at once gives other tokens than in one.

        To fix: keep the tokenizer free of shared buffers, or guard them.
        """
        texts = [*backend.texts, *backend.hard_texts] * 8
        want = [_encode(runtime.tokenizer, text) for text in texts]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda text: _encode(runtime.tokenizer, text), texts))
        check(got == want, "four threads that encode at once get other tokens than one alone")


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special=False, parse_special=False))

"""The backend suite: vectors, alone and in batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from stoker.interfaces import EmbeddingInfo, Runtime
from stoker.testing.conformance.backend_base import BackendSuite, generates
from stoker.testing.conformance.base import check
from stoker.testing.conformance.driving import LaneDriver, Run, check_same
from stoker.testing.conformance.subjects import BackendUnderTest

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BackendEmbedding"]


class BackendEmbedding(BackendSuite):
    """An input's vector does not depend on what else is embedded. Skipped where nothing embeds."""

    @pytest.fixture
    def embedding(self, runtime: Runtime) -> EmbeddingInfo:
        """How the model embeds."""
        if runtime.info.embedding is None or not runtime.info.capabilities.embed:
            pytest.skip("Capabilities.embed is false")
        return runtime.info.embedding

    @pytest.fixture
    def inputs(
        self, backend: BackendUnderTest, runtime: Runtime, embedding: EmbeddingInfo
    ) -> list[list[int]]:
        """Inputs of different lengths."""
        encoded = [
            list(runtime.tokenizer.encode(text, add_special=True, parse_special=False))
            for text in backend.texts
        ]
        lengths = (40, 3, 17, 8)
        return [
            tokens[: min(length, embedding.max_input_tokens)]
            for tokens, length in zip(encoded, lengths, strict=False)
        ]

    def test_vectors_have_the_shape_and_type(
        self, runtime: Runtime, embedding: EmbeddingInfo, inputs: list[list[int]]
    ) -> None:
        """``embed`` must answer ``float32[len(inputs), width]``, finite and not all zero.

        To fix: pool each input by itself, over its own tokens only.
        """
        for batch in (
            inputs,
            inputs[:1],
            [tokens[:2] for tokens in inputs * embedding.max_inputs][: embedding.max_inputs],
        ):
            vectors = runtime.embed(batch)
            check(
                vectors.shape == (len(batch), embedding.width) and vectors.dtype == np.float32,
                f"embed() gave {vectors.dtype}{list(vectors.shape)} for {len(batch)} inputs",
                f"Return float32[{len(batch)}, width={embedding.width}].",
            )
            check(
                np.isfinite(vectors).all() and (np.linalg.norm(vectors, axis=1) > 0).all(),
                "embed() gave vectors that are not finite, or zero",
            )

    def test_embedded_together_is_as_alone(
        self, backend: BackendUnderTest, runtime: Runtime, inputs: list[list[int]]
    ) -> None:
        """Inputs of different lengths get other vectors together than alone, or each other's.

        To fix: padding must be masked in attention and in pooling, and the vectors be in the inputs' order.
        """
        alone = [runtime.embed([tokens])[0].copy() for tokens in inputs]
        for order in (range(len(inputs)), range(len(inputs))[::-1]):
            together = runtime.embed([inputs[i] for i in order])
            for got, index in zip(together, order, strict=True):
                _check_vector(backend, got, alone[index], f"input {index} of {len(inputs)}")
        others = [v for v in alone[1:] if np.linalg.norm(_unit(v) - _unit(alone[0])) < 1e-3]
        check(not others, "different inputs got the same vector", "Look at pooling.")

    def test_the_longest_input_is_embedded(
        self, runtime: Runtime, embedding: EmbeddingInfo, inputs: list[list[int]]
    ) -> None:
        """An input of ``max_input_tokens`` fails.

        To fix: report in ``EmbeddingInfo.max_input_tokens`` what the model really takes.
        """
        limit = embedding.max_input_tokens
        if limit > 4096:
            pytest.skip(f"max_input_tokens is {limit}, which takes too long to try")
        longest = (inputs[0] * (limit // len(inputs[0]) + 1))[:limit]
        check(np.isfinite(runtime.embed([longest])).all(), f"{limit} tokens gave no finite vector")

    def test_pieces_give_the_same(
        self, backend: BackendUnderTest, runtime: Runtime, inputs: list[list[int]]
    ) -> None:
        """``embed_in_pieces`` gives other vectors than ``embed``, or cannot be left before its end.

        To fix: yield ``None`` after every piece but the last, then all vectors; clean up in ``finally``.
        """
        want = runtime.embed(inputs).copy()
        left = runtime.embed_in_pieces(inputs, 4)
        next(left, None)
        getattr(left, "close", lambda: None)()  # as the core does with what was cancelled
        *before, last = runtime.embed_in_pieces(inputs, 4)
        check(
            last is not None and all(piece is None for piece in before),
            "embed_in_pieces() must yield None after each piece but the last, and the vectors at last",
        )
        vectors: NDArray[np.float32] = np.asarray(last)
        for index, (got, wanted) in enumerate(zip(vectors, want, strict=True)):
            _check_vector(backend, got, wanted, f"input {index}, embedded in pieces")

    def test_embedding_touches_no_lane(
        self,
        backend: BackendUnderTest,
        runtime: Runtime,
        inputs: list[list[int]],
    ) -> None:
        """A sequence that runs gets another text because something was embedded meanwhile.

        To fix: embed in memory of its own, never in a lane's KV.
        """
        if not generates(runtime.info):
            pytest.skip("the model embeds and generates nothing")
        driver = LaneDriver(runtime)
        prompt = inputs[0][:8]
        driver.step(Run(0, prompt))
        want = driver.step(Run(0, prompt[:1]))[0]
        driver.truncate(0, 0)
        driver.step(Run(0, prompt))
        runtime.embed(inputs)
        got = driver.step(Run(0, prompt[:1]))[0]
        check_same(
            got, want, backend.tolerance, "a lane beside which was embedded", "Use other memory."
        )


def _unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return vector / np.float32(np.linalg.norm(vector))


def _check_vector(
    backend: BackendUnderTest, got: NDArray[np.float32], want: NDArray[np.float32], what: str
) -> None:
    apart = float(np.linalg.norm(_unit(got) - _unit(want)))
    check(
        apart <= backend.tolerance,
        f"{what}: the vector is {apart:.3g} away from the one it gets alone (both of length 1), and at most "
        f"{backend.tolerance:g} is rounding",
        "Mask padding in attention and in pooling; vectors come in the inputs' order.",
    )

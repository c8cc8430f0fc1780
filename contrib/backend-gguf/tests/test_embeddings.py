"""Embeddings of the real default model, against llama-cpp-python's own class and against themselves."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stoker import EmbeddingInfo, EngineError, OutOfMemoryError, machine
from stoker_backend_gguf.embedder import plan_embedding
from stoker_backend_gguf.options import GgufOptions
from stoker_backend_gguf.runtime import GgufRuntime

pytestmark = pytest.mark.model

TEXTS = (
    "The cat sat on the mat.",
    "A kitten lay on the rug.",
    "Interest rates rose by half a percent.",
    "x",
    "A long text. " * 60,
)

Load = Callable[..., GgufRuntime]


def unit(vectors: Any) -> np.ndarray[Any, Any]:
    found = np.asarray(vectors, np.float64)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def encode(runtime: GgufRuntime, text: str) -> list[int]:
    return runtime.tokenizer.encode(text, add_special=True, parse_special=False)


@pytest.fixture(scope="module")
def runtime(load: Load) -> GgufRuntime:
    return load(lanes=2)


@pytest.fixture(scope="module")
def inputs(runtime: GgufRuntime) -> list[list[int]]:
    return [encode(runtime, text) for text in TEXTS]


@pytest.fixture(scope="module")
def vectors(runtime: GgufRuntime, inputs: list[list[int]]) -> np.ndarray[Any, Any]:
    """Each input's, computed alone."""
    return np.concatenate([runtime.embed([tokens]) for tokens in inputs])


@pytest.fixture(scope="module", params=["mean", "cls", "last"])
def pooled(request: pytest.FixtureRequest, load: Load) -> GgufRuntime:
    return load(lanes=1, pooling=request.param)


@pytest.mark.slow
def test_the_numbers_are_those_of_llama_cpp_python(pooled: GgufRuntime, model_path: Path) -> None:
    import llama_cpp

    assert pooled.info.embedding is not None
    kinds = {"mean": 1, "cls": 2, "last": 3}
    theirs = llama_cpp.Llama(
        str(model_path),
        embedding=True,
        pooling_type=kinds[pooled.info.embedding.pooling],
        n_ctx=512,
        n_batch=512,
        n_ubatch=512,
        verbose=False,
    )
    expected = unit([theirs.embed(text) for text in TEXTS])
    theirs.close()
    found = unit(np.concatenate([pooled.embed([encode(pooled, text)]) for text in TEXTS]))
    assert np.einsum("ij,ij->i", expected, found).min() > 1 - 1e-4


def test_it_says_how_it_embeds(runtime: GgufRuntime) -> None:
    assert runtime.info.capabilities.embed
    assert runtime.info.embedding == EmbeddingInfo(
        width=576, max_input_tokens=512, pooling="mean", max_inputs=64
    )


def test_similar_texts_are_near(vectors: np.ndarray[Any, Any]) -> None:
    similarity = unit(vectors) @ unit(vectors).T
    assert similarity[0, 1] > similarity[0, 2]


def test_in_company_as_alone(
    runtime: GgufRuntime, inputs: list[list[int]], vectors: np.ndarray[Any, Any]
) -> None:
    together = runtime.embed([*inputs, inputs[0]])
    np.testing.assert_allclose(
        np.einsum("ij,ij->i", unit(together), unit([*vectors, vectors[0]])), 1.0, atol=3e-4
    )


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    order=st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=5),
    max_tokens=st.integers(20, 700),
)
def test_in_pieces_as_at_once(
    runtime: GgufRuntime,
    inputs: list[list[int]],
    vectors: np.ndarray[Any, Any],
    order: list[int],
    max_tokens: int,
) -> None:
    found = list(runtime.embed_in_pieces([inputs[i] for i in order], max_tokens))
    assert all(vector is None for vector in found[:-1])
    num_tokens = sum(len(inputs[i]) for i in order)
    assert len(found) >= num_tokens / max_tokens
    cosines = np.einsum("ij,ij->i", unit(found[-1]), unit(vectors[order]))
    np.testing.assert_allclose(cosines, 1.0, atol=3e-4)


def test_a_job_that_was_given_up_leaves_nothing(
    runtime: GgufRuntime, inputs: list[list[int]], vectors: np.ndarray[Any, Any]
) -> None:
    pieces = runtime.embed_in_pieces([inputs[4]], 32)
    assert next(pieces) is None
    cast("Generator[Any]", pieces).close()
    np.testing.assert_allclose(unit(runtime.embed([inputs[0]])), unit(vectors[:1]), atol=1e-6)


def test_lanes_are_not_touched(
    runtime: GgufRuntime, inputs: list[list[int]], run: Callable[..., np.ndarray[Any, Any]]
) -> None:
    runtime.truncate(0, 0)
    whole = run(runtime, (0, inputs[0], 0))
    runtime.truncate(0, 0)
    run(runtime, (0, inputs[0][:3], 0))
    runtime.embed(inputs)
    continued = run(runtime, (0, inputs[0][3:], 3))
    np.testing.assert_allclose(continued, whole, atol=0.3)
    assert continued.argmax() == whole.argmax()
    runtime.truncate(0, 0)


def test_bad_inputs_are_refused(runtime: GgufRuntime) -> None:
    for bad in ([[]], [[1] * 513], [[1]] * 65):
        with pytest.raises(EngineError):
            runtime.embed(bad)


def test_nothing_is_taken_before_it_is_used(load: Load) -> None:
    lazy = load(lanes=1, context=256)
    assert lazy._embedder is not None
    assert lazy._embedder._context is None
    lazy.embed([[1, 2, 3]])
    assert lazy._embedder._context is not None
    lazy.close()
    assert lazy._embedder._context is None
    with pytest.raises(EngineError, match="is closed"):
        lazy.embed([[1]])


def test_no_memory_is_an_answer(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    starved = load(lanes=1, context=256)
    monkeypatch.setattr(machine, "available_memory", lambda: 1_000_000)
    with pytest.raises(OutOfMemoryError, match="embedding_tokens"):
        starved.embed([[1]])


def test_options(load: Load) -> None:
    runtime = load(lanes=1, embedding_tokens=100, matryoshka=True, pooling="last")
    assert runtime.info.embedding == EmbeddingInfo(
        width=576, max_input_tokens=100, pooling="last", truncatable=True
    )
    runtime = load(lanes=1, embeddings=False)
    assert runtime.info.embedding is None
    assert not runtime.info.capabilities.embed
    with pytest.raises(TypeError, match="no capability"):
        runtime.embed([[1]])


@pytest.mark.parametrize(
    ("metadata", "options", "pooling"),
    [
        ({}, {}, "mean"),
        ({"pooling_type": 0}, {}, "mean"),
        ({"pooling_type": 1}, {}, "mean"),
        ({"pooling_type": 2}, {}, "cls"),
        ({"pooling_type": 3}, {}, "last"),
        ({"pooling_type": 3}, {"pooling": "mean"}, "mean"),
        ({"pooling_type": 4}, {}, None),  # a reranker's head
        ({"attention.causal": False}, {}, None),
        ({}, {"embeddings": False}, None),
    ],
)
def test_pooling_is_the_options_or_the_files(
    metadata: dict[str, Any], options: dict[str, Any], pooling: str | None
) -> None:
    header = cast(Any, SimpleNamespace(get=metadata.get))
    found = plan_embedding(header, GgufOptions(**options), 64, 512)
    assert (found and found.pooling) == pooling

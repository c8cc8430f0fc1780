"""The runtime of models that only embed: no lanes, no steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stoker import Runtime

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from stoker import RuntimeInfo, StepInput, StepOutput, Tokenizer
    from stoker_backend_torch.embedder import TorchEmbedder

__all__ = ["EmbeddingRuntime"]


class EmbeddingRuntime(Runtime):
    """A model that only embeds. Made by ``TorchBackend.load``.

    Args:
        info: Its facts: no lanes, and ``generates`` false.
        tokenizer: Its tokenizer.
        embedder: What embeds.
    """

    def __init__(self, info: RuntimeInfo, tokenizer: Tokenizer, embedder: TorchEmbedder) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self._embedder = embedder

    def step(self, step: StepInput) -> StepOutput:
        """Never called by the core.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{self.info.name} only embeds")

    def truncate(self, lane: int, num_tokens: int) -> int:
        """Never called by the core: there are no lanes.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{self.info.name} only embeds")

    def embed(self, inputs: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """See ``Runtime.embed``."""
        return self._embedder.embed(inputs)

    def embed_in_pieces(
        self, inputs: Sequence[Sequence[int]], max_tokens: int
    ) -> Iterator[NDArray[np.float32] | None]:
        """See ``Runtime.embed_in_pieces``."""
        return self._embedder.pieces(inputs, max_tokens)

    def close(self) -> None:
        """Free the weights. May be called twice."""
        self._embedder.close()

"""The bundled eviction strategies: which kept prefix goes first when room is needed."""

from __future__ import annotations

__all__: list[str] = []

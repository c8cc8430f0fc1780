"""The bundled tool formats: how families of models write tool calls."""

from __future__ import annotations

__all__: list[str] = []

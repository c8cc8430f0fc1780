"""The configuration without its secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from stoker.config import Config

__all__ = ["printable"]

_SECRET = re.compile(r"key|token|secret|password|passwd|credential", re.IGNORECASE)
_URL_USER = re.compile(r"://[^/@\s]*@")
_MASK = "********"
_DIGEST_START = len("sha256:") + 8  # enough to tell which key it is: what `stoker keys` calls it


def printable(config: Config) -> dict[str, Any]:
    """The configuration as plain data, with secrets masked: fit for logs and terminals."""
    data: dict[str, Any] = msgspec.to_builtins(config)
    data["server"]["api_keys"] = [_MASK] * len(config.server.api_keys)
    data["plugins"] = {name: _masked(section) for name, section in data["plugins"].items()}
    for tenant in data["tenants"]:
        tenant["keys"] = [
            f"{key[:_DIGEST_START]}..." if key.startswith("sha256:") else _MASK
            for key in tenant["keys"]
        ]
    for model in data["models"]:
        model["options"] = _masked(model["options"])
    return data


def _masked(value: Any, *, secret: bool = False) -> Any:
    """``value`` with every text masked that stands under a key that sounds secret.

    Numbers and switches stay: ``max_tokens = 5`` is no secret.
    """
    if isinstance(value, Mapping):
        return {
            key: _masked(item, secret=secret or bool(_SECRET.search(str(key))))
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_masked(item, secret=secret) for item in value]
    if isinstance(value, str):
        return _MASK if secret else _URL_USER.sub(f"://{_MASK}@", value)
    return value

"""A running server, as its clients see it: the OpenAI API over HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

import httpx

from stoker.api.auth import load_keys
from stoker.cli.common import base_url
from stoker.errors import ConfigError, StokerError

if TYPE_CHECKING:
    from stoker.config import Config

__all__ = ["RemoteServer", "ServerError", "find_server"]

_PROBE_TIMEOUT_S = 0.5
_TIMEOUT = httpx.Timeout(10.0, read=None)  # an answer may take as long as it takes


class ServerError(StokerError):
    """A server cannot be reached, or refuses."""


class RemoteServer:
    """Speaks to one server.

    Args:
        url: Its address, with or without ``/v1``.
        api_key: What to present.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        if "://" not in url:
            url = f"http://{url}"
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def models(self, timeout_s: float = 10.0) -> list[str]:
        """The ids of the models it serves.

        Raises:
            ServerError: It cannot be reached, or refuses.
        """
        response = self._ask("GET", "/v1/models", timeout_s=timeout_s)
        try:
            return [str(model["id"]) for model in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self.url} does not speak the OpenAI API") from error

    def cache(self, model: str | None = None) -> dict[str, Any]:
        """What its prefix caches keep: the body of ``GET /v1/cache``.

        Args:
            model: Of this model only.

        Raises:
            ServerError: It cannot be reached, refuses, or is no stoker.
        """
        return self._cache("GET", model)

    def clear_cache(self, model: str | None = None) -> dict[str, Any]:
        """Empty its prefix caches; returns the body of ``DELETE /v1/cache``.

        Args:
            model: Of this model only.

        Raises:
            ServerError: It cannot be reached, refuses, or is no stoker.
        """
        return self._cache("DELETE", model)

    def _cache(self, method: str, model: str | None) -> dict[str, Any]:
        response = self._ask(method, "/v1/cache", params={} if model is None else {"model": model})
        try:
            body = response.json()
            if isinstance(body["data"], list):
                return dict(body)
        except (ValueError, KeyError, TypeError):
            pass
        raise ServerError(f"{self.url} is not a stoker server that shows its cache")

    def _ask(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        timeout_s: float = 10.0,
    ) -> httpx.Response:
        """A successful answer.

        Raises:
            ServerError: There is none.
        """
        try:
            response = httpx.request(
                method,
                f"{self.url}{path}",
                params=params,
                headers=self._headers,
                timeout=timeout_s,
            )
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise ConfigError(f"--url: {self.url}: {error}") from error
        except httpx.HTTPError as error:
            raise ServerError(f"no server answers at {self.url}: {error}") from error
        if response.is_error:
            raise ServerError(_refusal(response.status_code, response.content))
        return response

    def models_if_running(self) -> list[str] | None:
        """The ids of the models it serves; ``None`` if nothing useful answers there."""
        try:
            return self.models(timeout_s=_PROBE_TIMEOUT_S)
        except StokerError:
            return None

    async def chat(self, body: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        """Yield the pieces of an answer's text.

        Args:
            body: A chat completion request, without ``stream``.

        Raises:
            ServerError: The server refused, or broke off.
        """
        try:
            async with (
                httpx.AsyncClient(timeout=_TIMEOUT, headers=self._headers) as client,
                client.stream(
                    "POST", f"{self.url}/v1/chat/completions", json={**body, "stream": True}
                ) as response,
            ):
                if response.is_error:
                    raise ServerError(_refusal(response.status_code, await response.aread()))
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or data == "[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise ServerError(str(event["error"].get("message", event["error"])))
                    for choice in event.get("choices", ()):
                        if text := choice.get("delta", {}).get("content"):
                            yield text
        except httpx.HTTPError as error:
            raise ServerError(f"the connection to {self.url} failed: {error}") from error


def find_server(config: Config, url: str | None, api_key: str | None) -> RemoteServer:
    """The server at ``url``, or the one that this configuration would start.

    The configuration's own API keys are presented only to the latter: they are no other server's business.
    """
    if url is not None:
        return RemoteServer(url, api_key)
    if api_key is None:
        api_key = next(iter(load_keys(config.server)), None)
    return RemoteServer(base_url(config), api_key)


def _refusal(status: int, body: bytes) -> str:
    """What an OpenAI error body says."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode("utf-8", "replace")
    return f"the server answered {status}: {message}"

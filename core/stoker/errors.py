"""Every error that stoker raises on purpose.

::

    StokerError
    ├── ConfigError              a setting is wrong; names the setting
    ├── PluginError              a plugin is wrong; names the plugin
    │   ├── PluginLoadError      its entry point does not import or raises
    │   ├── PluginConflictError  two distributions claim one name
    │   └── PluginContractError  it breaks the plugin contract (API version, misspelt hook, bad descriptor)
    ├── ModelError               a model cannot be found or loaded; one clear line
    │   └── OutOfMemoryError     it does not fit into this machine's memory or disk (HTTP 507)
    ├── RequestError             one request cannot be served; carries what an OpenAI error body needs
    │   ├── InvalidRequestError        400
    │   │   └── ContextLengthError     400, code ``context_length_exceeded``
    │   ├── AuthenticationError        401
    │   ├── PermissionDeniedError      403
    │   ├── ModelNotFoundError         404, code ``model_not_found``
    │   ├── RequestTooLargeError       413
    │   ├── RateLimitError             429, may carry ``retry_after_s``
    │   ├── RequestNotFoundError       404, no such request
    │   ├── DeadlineError              408, the request's own time ran out
    │   ├── RequestCancelledError      499, somebody cancelled it through the API
    │   ├── SlowReaderError            408, the client stopped reading
    │   ├── UnavailableError           503, draining or the model is not ready
    │   └── UnservedEndpointError      501, an endpoint of the OpenAI API that this server never serves
    └── EngineError              a runtime failed; what a client sees as a 500

Running out of KV memory is not here: it is an answer (``StepOutput.no_room``), not an error.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "AuthenticationError",
    "ConfigError",
    "ContextLengthError",
    "DeadlineError",
    "EngineError",
    "InvalidRequestError",
    "ModelError",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "PermissionDeniedError",
    "PluginConflictError",
    "PluginContractError",
    "PluginError",
    "PluginLoadError",
    "RateLimitError",
    "RequestCancelledError",
    "RequestError",
    "RequestNotFoundError",
    "RequestTooLargeError",
    "SlowReaderError",
    "StokerError",
    "UnavailableError",
    "UnservedEndpointError",
]


class StokerError(Exception):
    """Base of all errors raised on purpose; its message is fit to show to a user."""


class ConfigError(StokerError):
    """A setting is unknown, of the wrong type, or out of range."""


class PluginError(StokerError):
    """A plugin could not be used."""


class PluginLoadError(PluginError):
    """A plugin's entry point failed to import or to register."""


class PluginConflictError(PluginError):
    """Two plugins claim the same name."""


class PluginContractError(PluginError):
    """A plugin breaks the contract: wrong API version, misspelt hook, malformed descriptor."""


class ModelError(StokerError):
    """A model cannot be found, read or loaded."""


class OutOfMemoryError(ModelError):
    """A model does not fit into the memory or on the disk of this machine."""


class EngineError(StokerError):
    """A runtime failed while it computed."""


class RequestError(StokerError):
    """One request cannot be served.

    Args:
        message: What is wrong and what to do about it.
        param: The request field at fault, in the client's spelling (``messages.0.role``), if one is.
        code: OpenAI's machine-readable code, if there is one.
        retry_after_s: Seconds after which a retry makes sense; becomes ``Retry-After`` and, in
            milliseconds, ``retry-after-ms``.
        headers: More headers of the answer, lower-case names.
    """

    status_code: int = 500
    error_type: str = "server_error"
    default_code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})


class InvalidRequestError(RequestError):
    """The request is malformed or a field is out of range."""

    status_code = 400
    error_type = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """The prompt, or the prompt and what was asked for, exceeds the model's context."""

    default_code = "context_length_exceeded"


class AuthenticationError(RequestError):
    """No API key, or a wrong one."""

    status_code = 401
    error_type = "authentication_error"
    default_code = "invalid_api_key"


class PermissionDeniedError(RequestError):
    """The caller is known, but may not do this."""

    status_code = 403
    error_type = "permission_error"
    default_code = "permission_denied"


class ModelNotFoundError(RequestError):
    """No model of that name is served here."""

    status_code = 404
    error_type = "invalid_request_error"
    default_code = "model_not_found"


class RequestNotFoundError(RequestError):
    """No request of that id runs or is remembered, or it is another tenant's."""

    status_code = 404
    error_type = "invalid_request_error"
    default_code = "request_not_found"


class RequestTooLargeError(RequestError):
    """The body exceeds the configured limit."""

    status_code = 413
    error_type = "invalid_request_error"
    default_code = "request_too_large"


class RateLimitError(RequestError):
    """A quota is used up or the queue is full."""

    status_code = 429
    error_type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class DeadlineError(RequestError):
    """The request's queue deadline or total deadline has passed."""

    status_code = 408
    error_type = "timeout_error"
    default_code = "deadline_exceeded"


class RequestCancelledError(RequestError):
    """The request was cancelled through the API. (499 is not retried by clients, as 409 would be.)"""

    status_code = 499
    error_type = "invalid_request_error"
    default_code = "request_cancelled"


class SlowReaderError(RequestError):
    """The client has stopped reading its answer."""

    status_code = 408
    error_type = "timeout_error"
    default_code = "reader_stalled"


class UnavailableError(RequestError):
    """The server is draining or the model is not ready."""

    status_code = 503
    error_type = "server_error"
    default_code = "service_unavailable"


class UnservedEndpointError(RequestError):
    """The endpoint is one of the OpenAI API, but not what this server is for."""

    status_code = 501
    error_type = "invalid_request_error"
    default_code = "endpoint_not_supported"

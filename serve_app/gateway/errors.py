"""Errors that a caller sees, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class GatewayError(Exception):
    """An answer other than success.

    Args:
        message: One sentence for the caller; it never holds a key, a prompt or an address of the inside.
        param: The request parameter it is about, if one.
        code: A word for programs; default: the class's.
        headers: Further response headers.
        status: HTTP status; default: the class's.
    """

    status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.headers = dict(headers or {})
        self.status = status or self.status

    def body(self) -> bytes:
        """The JSON text of the answer."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


class InvalidRequest(GatewayError):
    """The request cannot be understood."""

    status = 400
    type = "invalid_request_error"
    code = None


class AuthenticationFailed(GatewayError):
    """No valid key or token."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class PermissionDenied(GatewayError):
    """The caller is known, and may not do this."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFound(GatewayError):
    """No such model or path (or none that the caller may know of)."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class TooLarge(GatewayError):
    """The body exceeds server.max_body_bytes."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class ContentBlocked(GatewayError):
    """A filter blocked the request or its answer."""

    status = 400
    type = "invalid_request_error"
    code = "content_filter"


class RateLimited(GatewayError):
    """A limit or a budget is used up. Budgets have code `insufficient_quota`, as OpenAI's do."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"


class Unavailable(GatewayError):
    """A part the request needs is away: no healthy backend, no store. Retry later."""

    status = 503
    type = "server_error"
    code = "service_unavailable"


class BackendFailed(GatewayError):
    """The backend broke or answered what is no answer."""

    status = 502
    type = "server_error"
    code = "bad_gateway"


class BackendTimeout(GatewayError):
    """The backend took too long."""

    status = 504
    type = "server_error"
    code = "gateway_timeout"

"""Errors of the client: each kind of failure has a class of its own."""

from __future__ import annotations


class DeepSeekError(Exception):
    """Any failure of a request."""


class ConnectionFailed(DeepSeekError):
    """The server was not reached, or hung up."""


class TimedOut(ConnectionFailed):
    """The server did not answer in time."""


class StreamBroken(DeepSeekError):
    """A stream ended before its end; `text` is what had come."""

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


class ApiError(DeepSeekError):
    """The server refused a request, or failed at it."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.request_id = status, code, param, request_id


class BadRequest(ApiError):
    """A setting or a prompt that can't be followed."""


class AuthenticationFailed(ApiError):
    """The API key is missing or wrong."""


class PermissionDenied(ApiError):
    """The server does not allow it."""


class NotFound(ApiError):
    """No such model, or no such route."""


class RateLimited(ApiError):
    """The server's queue is full; `retry_after` is when it may have room, in seconds."""

    retry_after: float | None = None


class ServerError(ApiError):
    """A fault of the server, or a server that is about to stop."""


BY_STATUS = {
    401: AuthenticationFailed,
    403: PermissionDenied,
    404: NotFound,
    429: RateLimited,
}


def class_of(status: int) -> type[ApiError]:
    """The class of errors with this status."""
    if status >= 500:
        return ServerError
    return BY_STATUS.get(status, BadRequest)

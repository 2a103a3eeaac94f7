"""Errors that clients get, in OpenAI's shape and in Anthropic's."""

from collections.abc import Mapping
from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
"""By status, as both interfaces name them; Anthropic's "api_error" is 500 there."""


class ApiError(Exception):
    """A request that is not answered, and why.

    Args:
      status: of HTTP.
      message: one sentence.
      param: the field that is at fault.
      code: a word that programs can compare.
      retry_after: seconds after which a client may try again; None says that it need not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.retry_after = param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Clients of OpenAI try 408, 409, 429 and 5xx again unless they are told not to."""
        if self.retry_after is not None:
            return {"retry-after": str(self.retry_after)}
        return {"x-should-retry": "false"} if self.status >= 500 else {}

    def openai(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def anthropic(self) -> dict[str, Any]:
        kind = "api_error" if self.status == 500 else TYPES.get(self.status, "api_error")
        if self.status == 413:
            kind = "request_too_large"
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A body that its sender can mend."""
    return ApiError(400, message, param=param, code=code)


def internal(request_id: str) -> ApiError:
    """A fault of ours: its traceback is in the log, not in the answer."""
    message = f"the server failed; its log has the traceback under request {request_id}"
    return ApiError(500, message, code="internal_error")


def shape(error: ApiError, dialect: str) -> Mapping[str, Any]:
    """The body of an answer in the client's dialect, "openai" or "anthropic"."""
    return error.anthropic() if dialect == "anthropic" else error.openai()

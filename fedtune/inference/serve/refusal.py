"""The refusal of a request, in OpenAI's format. This module loads no torch: a device without a model refuses all requests."""

from typing import Any


class Refused(Exception):
    """A refused request; `body()` is the error in OpenAI's format.

    Args:
        status: HTTP status.
        message: One sentence: the error and what to do.
        code: Error code for programs.
        param: The faulty field.
        retry_after: Seconds to wait before a retry.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

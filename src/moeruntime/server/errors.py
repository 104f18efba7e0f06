"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from moeruntime.errors import InputError, MoecError, ResourceError

__all__ = ["ApiError", "as_api_error"]

MAX_MESSAGE_CHARACTERS = 1000
_FIELD = re.compile(r"field '?(\w+)'?|^(\w+) is ")


@dataclass
class ApiError(Exception):
    """What a client gets instead of an answer.

    Attributes:
        status: of HTTP.
        message: one line that names the field and the way out.
        kind: OpenAI's `type`.
        code: OpenAI's `code`, for programs.
        param: the field that is wrong.
        retry_after_s: when to try again, for 429 and 503.
    """

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        message = self.message
        if len(message) > MAX_MESSAGE_CHARACTERS:
            message = message[:MAX_MESSAGE_CHARACTERS] + "..."
        error = {"message": message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def all_headers(self) -> dict[str, str]:
        """Its own and Retry-After."""
        if self.retry_after_s is None:
            return self.headers
        return self.headers | {"Retry-After": str(self.retry_after_s)}


def as_api_error(problem: MoecError) -> ApiError:
    """The caller's fault is a 400, a lack of memory a 503, everything else a 500."""
    message = str(problem)
    if isinstance(problem, InputError):
        found = _FIELD.search(message)
        param = next((name for name in found.groups() if name), None) if found else None
        return ApiError(400, message, param=param)
    if isinstance(problem, ResourceError):
        return ApiError(503, message, "server_error", "overloaded", retry_after_s=1)
    return ApiError(500, message, "server_error")

"""What every request passes first: the key, the size and speed of its body, one line in the log.

Everything is refused unless it is allowed: a route added later is behind the key by itself.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import time
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeruntime.errors import InputError
from moeruntime.server.answer import error_response
from moeruntime.server.errors import ApiError
from moeruntime.server.logs import LOG, escaped

__all__ = ["Guard", "read_key"]

OPEN_PATHS = ("/health/live", "/health/ready")
# All bodies that are being read, together: each may be as large as it likes, not all at once.
MAX_BODIES_BYTES = 256 * 2**20
# A body that is too large is read on so far and thrown away, or its sender, who is still writing,
# would never read the answer.
LINGER_BYTES = 128 * 2**20
MIN_KEY_CHARACTERS = 8


def read_key(path: Path) -> str:
    """The key in a file: its first line.

    Raises:
        InputError: no such file, or no key in it.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8") from None
    if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or len(key.split()) != 1:
        raise InputError(
            f"{path}: must hold one line of at least {MIN_KEY_CHARACTERS} ASCII characters"
        )
    return key


class Guard:
    """Wraps the whole application."""

    def __init__(
        self, app: ASGIApp, *, key: str | None, max_body_bytes: int, body_timeout_s: float
    ) -> None:
        """Let requests with `key` through to `app`; None lets all through."""
        self._app = app
        self._key = None if key is None else key.encode()
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._bodies_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then run it."""
        if scope["type"] != "http":
            return
        start_s = time.perf_counter()
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        held = _Held()
        try:
            self._check(scope)
            body = b""
            if scope["method"] not in ("GET", "HEAD"):
                _check_kind(scope)
                self._check_length(scope)
                try:
                    async with asyncio.timeout(self._body_timeout_s):
                        body = await self._read(receive, held)
                except TimeoutError:
                    raise ApiError(
                        408,
                        f"the body did not arrive within {self._body_timeout_s:g} s",
                        headers={"Connection": "close"},
                    ) from None
            await self._app(scope, _replay(body, receive), noting)
        except _Gone:
            pass
        except ApiError as problem:
            await error_response(problem)(scope, receive, noting)
        finally:
            self._bodies_bytes -= held.num_bytes
            taken_ms = 1000 * (time.perf_counter() - start_s)
            client = scope["client"][0] if scope.get("client") else "-"
            method, path = scope["method"], escaped(scope["path"][:200])
            LOG.info("%s %s %s %s %.1f ms", client, method, path, status or "gone", taken_ms)

    def _check(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, given = _header(scope, b"authorization").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key):
            return
        # So that a person's browser can show the page: it asks for a password by itself. Not for
        # what has effects, since a browser sends it along with other sites' requests too.
        if scheme.lower() == b"basic" and scope["method"] == "GET":
            try:
                _, _, password = base64.b64decode(given.strip(), validate=True).partition(b":")
            except binascii.Error:
                password = b""
            if hmac.compare_digest(password, self._key):
                return
        raise ApiError(
            401,
            "no or a wrong API key; send it as 'Authorization: Bearer KEY'",
            "authentication_error",
            "invalid_api_key",
            headers={"WWW-Authenticate": 'Bearer, Basic realm="moec"'},
        )

    def _check_length(self, scope: Scope) -> None:
        length = _header(scope, b"content-length")
        expected = int(length) if length.isdigit() else 0
        if self._bodies_bytes + expected > MAX_BODIES_BYTES:
            raise _too_many()

    async def _read(self, receive: Receive, held: _Held) -> bytes:
        """The whole body; one that is too large is read to its end and thrown away."""
        parts: list[bytes] = []
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            part = message.get("body", b"")
            num_bytes += len(part)
            if num_bytes <= self._max_body_bytes:
                parts.append(part)
                kept_bytes = len(part)
            else:
                parts, kept_bytes = [], -held.num_bytes
            held.num_bytes += kept_bytes
            self._bodies_bytes += kept_bytes
            if kept_bytes > 0 and self._bodies_bytes > MAX_BODIES_BYTES:
                raise _too_many()
            ended = not message.get("more_body", False)
            if num_bytes > self._max_body_bytes and (ended or num_bytes > LINGER_BYTES):
                raise ApiError(
                    413,
                    f"the body is larger than {self._max_body_bytes} bytes",
                    headers={"Connection": "close"},
                )
            if ended:
                return b"".join(parts)


@dataclass(slots=True)
class _Held:
    """What a request has of all bodies."""

    num_bytes: int = 0


def _too_many() -> ApiError:
    return ApiError(
        429,
        "too many large requests at once",
        "rate_limit_error",
        retry_after_s=1,
        headers={"Connection": "close"},
    )


class _Gone(Exception):  # noqa: N818
    """The caller left before the body was complete."""


def _check_kind(scope: Scope) -> None:
    """JSON only: forms and files have no meaning here, and browsers ask before they send JSON."""
    kind = _header(scope, b"content-type").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        shown = ascii(kind[:60].decode("latin-1"))
        raise ApiError(415, f"content-type is {shown}; send application/json")


def _header(scope: Scope, name: bytes) -> bytes:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand out a body that was read, then whatever comes after it."""
    given = False

    async def read() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read

"""Bodies that are being read, all together."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("starlette")

from moeruntime.server import guard as guard_module
from moeruntime.server.guard import Guard

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/",
    "headers": [(b"content-type", b"application/json")],
}


class Caller:
    """Sends a body part by part, when told to, and keeps the answer."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[tuple[bytes, bool]] = asyncio.Queue()
        self.status = 0

    async def receive(self) -> dict[str, Any]:
        body, more = await self.parts.get()
        return {"type": "http.request", "body": body, "more_body": more}

    async def send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)


def test_bodies_count_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of unknown length, too, which nobody announced."""
    monkeypatch.setattr(guard_module, "MAX_BODIES_BYTES", 100)
    sizes: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sizes.append(len((await receive())["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def run() -> list[int]:
        guard = Guard(app, key=None, max_body_bytes=80, body_timeout_s=5.0)
        callers = [Caller() for _ in range(3)]
        tasks = [asyncio.create_task(guard(dict(SCOPE), one.receive, one.send)) for one in callers]
        first, second, third = callers
        for one, size in ((first, 60), (second, 60)):
            one.parts.put_nowait((b" " * size, True))
            await asyncio.sleep(0.01)
        assert second.status == 429 and first.status == 0
        first.parts.put_nowait((b" " * 10, False))
        await tasks[0]
        third.parts.put_nowait((b" " * 200, True))  # too large, and so thrown away
        third.parts.put_nowait((b"", False))
        await asyncio.gather(*tasks)
        assert guard._bodies_bytes == 0
        return [one.status for one in callers]

    assert asyncio.run(run()) == [200, 429, 413]
    assert sizes == [70]

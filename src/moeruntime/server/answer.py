"""An answer on its way: one JSON object, or server-sent events.

The caller may leave at any time. A watcher waits for that beside the work, so that a request ends
where it is, queued or running, streamed or not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from moeruntime.errors import MoecError
from moeruntime.request import Output
from moeruntime.server.desk import Desk
from moeruntime.server.errors import ApiError, as_api_error
from moeruntime.server.logs import LOG
from moeruntime.server.protocol import Generation
from moeruntime.server.responses import Shaper

__all__ = ["Answer", "error_response"]


def error_response(problem: ApiError) -> Response:
    """An error in OpenAI's shape."""
    return JSONResponse(problem.body(), problem.status, headers=problem.all_headers())


class Answer(Response):
    """Runs a generation when it is called, and sends what comes of it."""

    def __init__(self, desk: Desk, asked: Generation) -> None:
        """Nothing is done before the call."""
        super().__init__()
        self._desk = desk
        self._asked = asked
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do it, unless the caller leaves."""
        work = asyncio.create_task(self._answer(scope, receive, send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not work.done():
                work.cancel()
            # Until it has given everything back, whatever ended it.
            await asyncio.gather(work, leaving, return_exceptions=True)
        if not work.cancelled() and (problem := work.exception()) is not None:
            raise problem

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._generate(scope, receive, send)
            return
        except ApiError as problem:
            error = problem
        except MoecError as problem:
            error = as_api_error(problem)
        self._desk.metrics.rejected(self._asked.model, error.code or str(error.status))
        if not self._begun:
            await error_response(error)(scope, receive, send)
            return
        LOG.warning("a stream of %s ended early: %s", self._asked.model, error.message)
        await self._event(send, error.body())
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._desk.admit(self._asked) as exchange:
            shaper = Shaper(self._asked, exchange.prompts, exchange.text)
            outputs: dict[int, Output] = {}
            async for choice, delta in self._desk.deltas(exchange):
                if self._asked.stream:
                    if not self._begun:
                        await self._begin(send)
                        for chunk in shaper.opening():
                            await self._event(send, chunk)
                    for chunk in shaper.chunks(choice, delta):
                        await self._event(send, chunk)
                elif delta.output is not None:
                    outputs[choice] = delta.output
        if not self._asked.stream:
            answer = shaper.whole([outputs[choice] for choice in sorted(outputs)])
            await JSONResponse(answer)(scope, receive, send)
            return
        for chunk in shaper.closing():
            await self._event(send, chunk)
        body = b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _begin(self, send: Send) -> None:
        """Not before the first token: until then a refusal has a status of its own."""
        self._begun = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _event(self, send: Send, chunk: Mapping[str, Any]) -> None:
        data = json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode()
        body = b"data: " + data + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

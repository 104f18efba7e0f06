"""The routes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from moeruntime.errors import MoecError
from moeruntime.pack import Manifest
from moeruntime.server.answer import Answer, error_response
from moeruntime.server.desk import Desk
from moeruntime.server.errors import ApiError, as_api_error
from moeruntime.server.guard import Guard
from moeruntime.server.logs import LOG
from moeruntime.server.protocol import Endpoint, parse_generation, parse_tokenization

__all__ = ["build_app"]

T = TypeVar("T")
PAGE = Path(__file__).with_name("page.html")
# Parsing more than this is not done on the event loop.
LARGE_BODY_BYTES = 64 * 1024


def build_app(desk: Desk, manifest: Manifest, key: str | None) -> ASGIApp:
    """Everything that is served, behind the guard."""
    routes = _Routes(desk, manifest)
    app = Starlette(
        routes=[
            Route("/", routes.page, methods=["GET"]),
            Route("/stats", routes.stats, methods=["GET"]),
            Route("/health/live", routes.live, methods=["GET"]),
            Route("/health/ready", routes.ready, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/v1/models/{model}", routes.model, methods=["GET"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
        ],
        exception_handlers={
            ApiError: routes.refused,
            MoecError: routes.refused,
            HTTPException: _no_such_route,
            Exception: _broken,
        },
    )
    limits = desk.limits
    return Guard(
        app,
        key=key,
        max_body_bytes=limits.max_body_bytes,
        body_timeout_s=limits.body_timeout_s,
    )


class _Routes:
    """What is behind each path."""

    def __init__(self, desk: Desk, manifest: Manifest) -> None:
        self._desk = desk
        self._config = manifest.config
        self._started_s = time.time()
        self._page = PAGE.read_text(encoding="utf-8")
        self._policy = _content_policy(self._page)

    async def completions(self, request: Request) -> Response:
        return await self._generation(request, "completions")

    async def chat(self, request: Request) -> Response:
        return await self._generation(request, "chat")

    async def _generation(self, request: Request, endpoint: Endpoint) -> Response:
        variants = self._desk.variants
        asked = await _parse(request, lambda body: parse_generation(body, endpoint, variants))
        return Answer(self._desk, asked)

    async def tokenize(self, request: Request) -> Response:
        variants = self._desk.variants
        asked = await _parse(request, lambda body: parse_tokenization(body, variants))
        ids = await self._desk.tokenize(asked.model, asked.prompt)
        return JSONResponse(
            {"count": len(ids), "max_model_len": self._config.max_context, "tokens": ids}
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [self._card(name) for name in self._desk.variants]}
        )

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._desk.variants:
            raise ApiError(
                404, f"no model {ascii(name[:80])}", code="model_not_found", param="model"
            )
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": int(self._started_s),
            "owned_by": "moec",
            "max_model_len": self._config.max_context,
        }

    async def live(self, request: Request) -> Response:
        failed = self._desk.loop.ended.is_set() and not self._desk.draining
        return JSONResponse({"live": not failed}, 503 if failed else 200)

    async def ready(self, request: Request) -> Response:
        try:
            self._desk.check_ready()
        except ApiError as problem:
            # Not as an error: who asks for this wants the reason, and nothing went wrong.
            body = {"ready": False, "reason": problem.message}
            return JSONResponse(body, 503, headers=problem.all_headers())
        return JSONResponse({"ready": True})

    async def metrics(self, request: Request) -> Response:
        return Response(
            self._desk.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers={"Content-Security-Policy": self._policy})

    async def stats(self, request: Request) -> Response:
        """What the page shows."""
        desk, snapshot = self._desk, self._desk.loop.snapshot
        variants = {}
        for name in desk.variants:
            state = snapshot.variants.get(name)
            variants[name] = {
                "resident": bool(state and state.resident),
                "running": state.num_running if state else 0,
                "queued": desk.num_waiting(name),
                "tokens": desk.metrics.num_tokens[name],
                "ttft_ms": desk.metrics.ttft_ms(name),
            }
        return JSONResponse(
            {
                "state": "ready" if desk.ready else "draining" if desk.draining else "loading",
                "device": snapshot.device,
                "uptime_s": round(time.time() - self._started_s, 1),
                "variants": variants,
                "cache_usage": round(snapshot.cache_usage, 4),
                "activations": snapshot.num_activations,
                "memory_bytes": snapshot.memory_bytes,
            },
            headers={"Cache-Control": "no-store"},
        )

    async def refused(self, request: Request, problem: Exception) -> Response:
        if isinstance(problem, MoecError):
            problem = as_api_error(problem)
        assert isinstance(problem, ApiError)
        self._desk.metrics.rejected("", problem.code or str(problem.status))
        return error_response(problem)


async def _parse(request: Request, parse: Callable[[bytes], T]) -> T:
    body = await request.body()
    if len(body) > LARGE_BODY_BYTES:
        return await asyncio.to_thread(parse, body)
    return parse(body)


async def _no_such_route(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    method, path = request.method, request.url.path[:200]
    message = {404: f"no route {ascii(path)}", 405: f"{method} is not allowed here"}
    return error_response(
        ApiError(
            problem.status_code,
            message.get(problem.status_code, problem.detail),
            headers=dict(problem.headers or {}),
        )
    )


async def _broken(request: Request, problem: Exception) -> Response:
    LOG.error("a bug in moec", exc_info=problem)
    return error_response(ApiError(500, "internal error; see the server's log", "server_error"))


def _content_policy(page: str) -> str:
    """Nothing but the page's own script and style, and this server's numbers."""
    parts = [
        "default-src 'none'",
        "connect-src 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    ]
    for tag in ("script", "style"):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in texts]
        parts.append(f"{tag}-src " + " ".join(f"'sha256-{one.decode()}'" for one in digests))
    return "; ".join(parts)

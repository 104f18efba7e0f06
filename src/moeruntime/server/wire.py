"""Connections and signals: uvicorn, with time limits on headers and an end in two steps.

When told to end, the server goes on listening and refuses what is new with a 503, until everything
under way has come to its end or the time for that is over; only then it closes its socket.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from moeruntime.errors import MoecError, UsageError
from moeruntime.server.desk import Desk
from moeruntime.server.logs import LOG

__all__ = ["listen", "serve_forever"]

MAX_HEADER_BYTES = 64 * 1024
MAX_CONNECTIONS = 2048
# Connections of clients that do not read get so long once all requests have ended.
CLOSING_S = 5


def listen(host: str, port: int) -> socket.socket:
    """Bind a listening socket.

    Raises:
        UsageError: the address is not ours or taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as problem:
        raise UsageError(f"cannot listen on {host} port {port}: {problem.strerror}") from None
    sock.listen(MAX_CONNECTIONS)
    return sock


def serve_forever(
    app: ASGIApp, desk: Desk, sock: socket.socket, on_ready: Callable[[], None]
) -> None:
    """Serve until a signal says otherwise; SIGINT and SIGTERM end it gracefully, a second one now.

    Raises:
        MoecError, Exception: whatever ended the engine.
    """
    config = uvicorn.Config(
        app,
        http=_protocol(desk.limits.header_timeout_s),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=max(1, int(desk.limits.header_timeout_s)),
        timeout_graceful_shutdown=CLOSING_S,
    )
    server = _Server(config, desk)
    asyncio.run(_serve(server, desk, sock, on_ready))
    if desk.loop.failure is not None:
        raise desk.loop.failure


async def _serve(
    server: _Server, desk: Desk, sock: socket.socket, on_ready: Callable[[], None]
) -> None:
    desk.loop.start()
    watching = asyncio.create_task(desk.watch())
    announcing = asyncio.create_task(_announce(desk, on_ready))
    ending = asyncio.create_task(_end_with_engine(server, desk))
    try:
        await server.serve(sockets=[sock])
    finally:
        for task in (watching, announcing, ending):
            task.cancel()
        if not await desk.loop.stop(timeout_s=10):
            LOG.warning("the engine is still busy and is left behind")
        desk.close()


async def _announce(desk: Desk, on_ready: Callable[[], None]) -> None:
    await desk.loop.ready.wait()
    on_ready()


async def _end_with_engine(server: _Server, desk: Desk) -> None:
    """A server without an engine is none; its supervisor may start another."""
    await desk.loop.ended.wait()
    if isinstance(desk.loop.failure, MoecError) and not desk.loop.ready.is_set():
        server.should_exit = True  # loading failed, and the one line says why
        return
    await asyncio.sleep(1)  # for those under way to read what happened
    server.should_exit = True


class _Server(uvicorn.Server):
    """Drains before it closes."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self._desk = desk
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends at once."""
        if self._desk.draining:
            self.should_exit = self.force_exit = True
            return
        self._desk.draining = True
        # Signal handlers run between any two instructions; the event loop does the rest.
        asyncio.get_running_loop().call_soon_threadsafe(self._drain, signal.Signals(sig).name)

    def _drain(self, name: str) -> None:
        LOG.info("%s: finishing %d requests", name, self._desk.num_open)
        self._draining = asyncio.create_task(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        if not await self._desk.drain():
            LOG.warning("some requests were refused: there was no time left to finish them")
        self.should_exit = True


def _protocol(header_timeout_s: float) -> type[H11Protocol]:
    """Uvicorn's protocol, whose connections must send whole headers in time."""

    class Timed(H11Protocol):
        """Closes connections whose next request does not begin, or whose headers do not end."""

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            if self.conn.their_state is not h11.IDLE:
                self._stop_waiting()
            elif self._deadline is None:
                self._expect_headers()

        def _expect_headers(self) -> None:
            self._deadline = self.loop.call_later(header_timeout_s, self._give_up)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            busy = self.cycle is not None and not self.cycle.response_complete
            if not busy and not self.transport.is_closing():
                self.transport.close()

    return Timed

"""Admission: who may ask now, how many wait, how long, and what becomes of them.

Lives on the event loop. Everything a request holds hangs on an `Exchange`; leaving it, for whatever
reason, gives all of it back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from moeruntime.errors import MoecError
from moeruntime.prompts import Prompts
from moeruntime.request import Delta, Request
from moeruntime.server.errors import ApiError, as_api_error
from moeruntime.server.loop import EngineLoop, Event, Job
from moeruntime.server.metrics import Metrics, Timing
from moeruntime.server.protocol import Generation, Prompt
from moeruntime.text import VariantText

__all__ = ["Desk", "Exchange", "Limits"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one server takes on.

    Attributes:
        max_queue: sequences of one variant that may wait for their first token.
        max_wait_s: how long a request waits for it before it is refused.
        request_timeout_s: how long a request may take in all.
        drain_s: how long those under way may take once the server is told to end.
        max_body_bytes: of one request.
        body_timeout_s: for a body to arrive.
        header_timeout_s: for headers to arrive, and for an idle connection.
    """

    max_queue: int = 128
    max_wait_s: float = 60.0
    request_timeout_s: float = 600.0
    drain_s: float = 30.0
    max_body_bytes: int = 8 * 2**20
    body_timeout_s: float = 20.0
    header_timeout_s: float = 10.0


class Exchange:
    """One request under way: its jobs, and what comes back from them."""

    def __init__(
        self,
        asked: Generation,
        prompts: list[tuple[int, ...]],
        text: VariantText,
        loop: EngineLoop,
    ) -> None:
        """Make a job for every choice; none is submitted yet."""
        self.asked = asked
        self.prompts = prompts
        self.text = text
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.timings = [Timing() for _ in range(asked.num_choices)]
        self._loop = loop
        self.open = {
            choice: Job(
                Request(
                    asked.model,
                    prompts[choice // asked.n],
                    asked.sampling_of(choice),
                    chat=asked.endpoint == "chat",
                ),
                choice,
                self.events,
            )
            for choice in range(asked.num_choices)
        }

    @property
    def num_waiting(self) -> int:
        """Sequences without a first token."""
        return sum(self.timings[choice].first_s is None for choice in self.open)

    def submit(self) -> None:
        """Hand all jobs to the engine."""
        for job in self.open.values():
            self._loop.submit(job)

    def fail(self, problem: MoecError | ApiError) -> None:
        """End it with an error, once what has come already is read."""
        error = problem if isinstance(problem, MoecError) else _RefusalError(problem)
        self.events.put_nowait((0, error))


class _RefusalError(MoecError):
    """Carries an `ApiError` to whoever reads events."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


class Desk:
    """Where requests come in."""

    def __init__(
        self,
        loop: EngineLoop,
        variants: tuple[str, ...],
        texts: Callable[[], Mapping[str, Prompts]],
        metrics: Metrics,
        limits: Limits,
    ) -> None:
        """Open for nobody until the engine is ready.

        Args:
            loop: the engine's thread.
            variants: names that may be asked for.
            texts: makes a `Prompts` for each variant, once the engine is there.
            metrics: told of everything.
            limits: how much to take on.
        """
        self.loop = loop
        self.variants = variants
        self.metrics = metrics
        self.limits = limits
        self.draining = False
        self._make_texts = texts
        self._texts: Mapping[str, Prompts] = {}
        # A thread for each variant: a slow template holds up nobody but its own variant.
        self._threads = {name: ThreadPoolExecutor(1, f"text-{name}") for name in variants}
        self._reserved: Counter[str] = Counter()
        self._exchanges: set[Exchange] = set()
        self._emptied = asyncio.Event()
        self._emptied.set()

    def close(self) -> None:
        """End the template workers and threads."""
        for prompts in self._texts.values():
            prompts.close()
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)

    # -- state -----------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.loop.ready.is_set() and not self.loop.ended.is_set() and not self.draining

    @property
    def num_open(self) -> int:
        """Requests under way."""
        return len(self._exchanges) + self._reserved.total()

    def check_ready(self) -> None:
        """Raise the 503 that says what is missing."""
        if self.draining:
            raise ApiError(
                503,
                "the server is shutting down",
                "server_error",
                "shutting_down",
                retry_after_s=5,
                headers={"Connection": "close"},
            )
        if self.loop.ended.is_set():
            raise ApiError(503, "the engine has failed", "server_error", "engine_failed")
        if not self.loop.ready.is_set():
            raise ApiError(503, "still loading", "server_error", "loading", retry_after_s=5)

    async def watch(self) -> None:
        """Fail whatever is open if the engine's thread ends; runs for the server's whole life."""
        await self.loop.ended.wait()
        self._fail_all(ApiError(500, "the engine has failed; see the server's log", "server_error"))

    async def drain(self) -> bool:
        """Refuse what is new and wait for what is under way; whether all of it came to its end."""
        self.draining = True
        try:
            async with asyncio.timeout(self.limits.drain_s):
                await self._emptied.wait()
            return True
        except TimeoutError:
            self._fail_all(
                ApiError(503, "the server is shutting down", "server_error", "shutting_down")
            )
        try:
            async with asyncio.timeout(5):
                await self._emptied.wait()
        except TimeoutError:
            pass  # clients that do not read what they are told
        return False

    def _fail_all(self, error: ApiError) -> None:
        for exchange in self._exchanges:
            exchange.fail(error)

    # -- requests --------------------------------------------------------------------------------

    async def tokenize(self, model: str, prompt: Prompt) -> list[int]:
        """A prompt's tokens.

        Raises:
            MoecError: the variant cannot turn it into tokens.
            ApiError: not ready.
        """
        self.check_ready()
        return await self._in_thread(model, lambda texts: texts.encode(_request(model, prompt)))

    @asynccontextmanager
    async def admit(self, asked: Generation) -> AsyncIterator[Exchange]:
        """Take a request on, until the block ends; then whatever of it still runs is given up.

        Raises:
            ApiError: not ready, or too many wait already.
            MoecError: the prompt is no good.
        """
        self.check_ready()
        model = asked.model
        if asked.num_choices > self.limits.max_queue:
            raise ApiError(
                400,
                f"'n' times the prompts is {asked.num_choices}; at most {self.limits.max_queue} "
                "sequences of a model may wait",
            )
        if self.num_waiting(model) + asked.num_choices > self.limits.max_queue:
            raise self._too_many(model)
        self._reserved[model] += asked.num_choices
        self._emptied.clear()
        exchange: Exchange | None = None
        try:
            prompts, text = await self._in_thread(model, lambda texts: _encode(texts, asked))
            exchange = Exchange(asked, prompts, text, self.loop)
            self._exchanges.add(exchange)
            self._reserved[model] -= asked.num_choices
            exchange.submit()
            yield exchange
        finally:
            if exchange is None:
                self._reserved[model] -= asked.num_choices
            else:
                self._exchanges.discard(exchange)
                for job in exchange.open.values():
                    self.loop.abort(job)
                    self.metrics.aborted(model)
            if not self._exchanges and not self._reserved.total():
                self._emptied.set()

    async def deltas(self, exchange: Exchange) -> AsyncIterator[tuple[int, Delta]]:
        """What comes of an exchange, (choice, delta), until all its choices have ended.

        Raises:
            ApiError: it waits or takes too long, or something failed.
        """
        limits = self.limits
        clock = asyncio.get_running_loop().time
        start_s = clock()
        while exchange.open:
            limit_s = limits.request_timeout_s
            if exchange.num_waiting == len(exchange.timings):
                limit_s = min(limit_s, limits.max_wait_s)
            try:
                async with asyncio.timeout_at(start_s + limit_s):
                    choice, event = await exchange.events.get()
            except TimeoutError:
                raise self._too_long(exchange, clock() - start_s) from None
            if isinstance(event, _RefusalError):
                raise event.error
            if isinstance(event, MoecError):
                raise as_api_error(event)
            timing = exchange.timings[choice]
            self.metrics.token(exchange.asked.model, timing)
            if event.output is not None:
                del exchange.open[choice]
                self.metrics.finished(event.output, timing)
            yield choice, event

    def num_waiting(self, model: str) -> int:
        """Sequences of a variant that have no token yet, wherever they are."""
        waiting = sum(one.num_waiting for one in self._exchanges if one.asked.model == model)
        return waiting + self._reserved[model]

    async def _in_thread(self, model: str, work: Callable[[Prompts], T]) -> T:
        loop = asyncio.get_running_loop()
        if not self._texts:
            self._texts = self._make_texts()
        texts = self._texts[model]
        return await loop.run_in_executor(self._threads[model], lambda: work(texts))

    def _too_many(self, model: str) -> ApiError:
        return ApiError(
            429,
            f"{self.num_waiting(model)} requests for {model} are waiting already, of at most "
            f"{self.limits.max_queue}",
            "rate_limit_error",
            "queue_full",
            retry_after_s=self._retry_after_s(model),
        )

    def _too_long(self, exchange: Exchange, taken_s: float) -> ApiError:
        if exchange.num_waiting == len(exchange.timings):
            return ApiError(
                429,
                f"waited {taken_s:.0f} s for a first token; the server is busy",
                "rate_limit_error",
                "waited_too_long",
                retry_after_s=self._retry_after_s(exchange.asked.model),
            )
        return ApiError(504, f"took over {taken_s:.0f} s", "server_error", "timeout")

    def _retry_after_s(self, model: str) -> int:
        """What a first token took lately, as a guess of when the queue is shorter."""
        lately_ms = self.metrics.ttft_ms(model)["p50"] or 1000.0
        return max(1, min(60, round(lately_ms / 1000)))


def _request(model: str, prompt: Prompt) -> Request:
    return Request(model, list(prompt) if isinstance(prompt, tuple) else prompt)  # type: ignore[arg-type]


def _encode(texts: Prompts, asked: Generation) -> tuple[list[tuple[int, ...]], VariantText]:
    """Prompts' tokens, which are sure to fit: found out here and not in the engine's thread."""
    prompts = []
    for prompt in asked.prompts:
        ids = texts.encode(_request(asked.model, prompt))
        texts.fit(asked.sampling, len(ids))
        prompts.append(tuple(ids))
    text = texts.text(asked.model)
    if asked.sampling.logprobs is not None or asked.sampling.stop:
        _ = text.tokenizer  # its absence is the caller's business before anything has run
    return prompts, text

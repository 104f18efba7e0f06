"""The thread that owns the engine; everybody else sends it notes and gets deltas back.

Submissions and aborts cross by a thread-safe queue, outputs by the event loop's own. Neither side
ever waits for the other: the event loop does not know when a step ends, the engine not who reads.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moeruntime.engine import Engine
from moeruntime.errors import MoecError
from moeruntime.qos import FairShare
from moeruntime.request import Delta, Request
from moeruntime.server.logs import LOG
from moeruntime.warmup import warm_up

__all__ = ["EngineLoop", "Job", "Snapshot", "VariantState"]

Event = Delta | MoecError
SNAPSHOT_EVERY_S = 0.05


@dataclass(eq=False, slots=True)
class Job:
    """One sequence, from its submission to its last delta.

    Attributes:
        request: token ids and sampling.
        choice: its place in the answer.
        events: where deltas go, or the error that ends it; read by the event loop only.
        request_id: the engine's; the worker's business only.
    """

    request: Request
    choice: int
    events: asyncio.Queue[tuple[int, Event]]
    request_id: int | None = None


@dataclass(frozen=True, slots=True)
class VariantState:
    """One variant at one moment."""

    num_running: int = 0
    num_waiting: int = 0
    resident: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine at one moment, for whoever looks; `cache_usage` in 0..1."""

    variants: dict[str, VariantState] = field(default_factory=dict)
    cache_usage: float = 0.0
    num_activations: int = 0
    num_reused_tokens: int = 0
    num_steps: int = 0
    memory_bytes: dict[str, int] = field(default_factory=dict)
    device: str = ""


class EngineLoop:
    """Runs an engine in a thread of its own."""

    def __init__(self, open_engine: Callable[[FairShare], Engine], waiting: FairShare) -> None:
        """Nothing runs yet.

        Args:
            open_engine: called in the thread; whatever it raises becomes `failure`.
            waiting: the engine's waiting room, which learns what steps take.
        """
        self._open_engine = open_engine
        self._waiting = waiting
        self._notes: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._snapshot_s = 0.0
        self._num_steps = 0
        self.snapshot = Snapshot()
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        self.failure: BaseException | None = None

    # -- the event loop's side ------------------------------------------------------------------

    def start(self) -> None:
        """Start loading; `ready` is set when a token has come out, `ended` if it ever ends."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; its events follow."""
        self._notes.put(("submit", job))

    def abort(self, job: Job) -> None:
        """Give a job up, wherever it is; nothing of it follows but what is on its way."""
        self._notes.put(("abort", job))

    async def stop(self, timeout_s: float) -> bool:
        """End the thread after its current step, and close the engine; False if it takes longer."""
        self._notes.put(("stop", None))
        await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    # -- the thread -----------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            with self._open_engine(self._waiting) as engine:
                warm_up(engine)  # nothing that is broken is called ready
                self._waiting.forget()
                self._note_state(engine)
                self._call(self.ready.set)
                self._serve(engine)
        except BaseException as problem:  # it must not die unnoticed, whatever it is
            self.failure = problem
            if not isinstance(problem, MoecError):
                LOG.exception("the engine failed")
            failed = MoecError(f"the engine failed: {type(problem).__name__}")
            self._hand_over([(job, failed) for job in self._jobs.values()])
        finally:
            self._jobs.clear()
            self._call(self.ended.set)

    def _serve(self, engine: Engine) -> None:
        while True:
            engine.await_turn()
            if not self._read_notes(engine):
                return
            start_s = time.perf_counter()
            deltas = engine.step()
            self._waiting.observe(time.perf_counter() - start_s)
            self._num_steps += 1
            events: list[tuple[Job, Event]] = []
            for delta in deltas:
                events.append((self._jobs[delta.request_id], delta))
                if delta.output is not None:
                    del self._jobs[delta.request_id]
            if start_s - self._snapshot_s > SNAPSHOT_EVERY_S or engine.scheduler.idle:
                self._note_state(engine)
                self._snapshot_s = start_s
            self._hand_over(events)

    def _read_notes(self, engine: Engine) -> bool:
        """Do what was asked for, waiting for something where there is nothing to run."""
        while True:
            try:
                what, job = self._notes.get(block=engine.scheduler.idle)
            except queue.Empty:
                return True
            if job is None:
                return False
            if what == "submit":
                self._submit(engine, job)
            elif job.request_id is not None and job.request_id in self._jobs:
                del self._jobs[job.request_id]
                engine.abort(job.request_id)
                self._note_state(engine)

    def _submit(self, engine: Engine, job: Job) -> None:
        try:
            job.request_id = engine.submit(job.request)
        except MoecError as problem:
            self._hand_over([(job, problem)])
            return
        self._jobs[job.request_id] = job

    def _hand_over(self, events: Sequence[tuple[Job, Event]]) -> None:
        """To the event loop, in one call."""
        if events:
            self._call(lambda: _put(events))

    def _call(self, work: Callable[[], object]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(work)
        except RuntimeError:  # the event loop has ended: nobody is left to tell
            return

    def _note_state(self, engine: Engine) -> None:
        scheduler, residency, memory = engine.scheduler, engine.residency, engine.memory
        resident = set(residency.resident)
        running = [sequence.variant for sequence in scheduler.running]
        variants = {
            name: VariantState(
                running.count(name), self._waiting.num_waiting(name), name in resident
            )
            for name in engine.source.manifest.variant_names
        }
        parts = {
            "experts": memory.experts_bytes + memory.decoded_bytes,
            "shared": memory.shared_bytes,
            "resident variants": memory.resident_bytes + memory.kept_bytes,
            "key-value cache": memory.cache_bytes,
            "buffers": memory.buffer_bytes,
            "host copies": memory.host_bytes,
        }
        self.snapshot = Snapshot(
            variants,
            1.0 - engine.num_free_blocks / memory.num_blocks,
            residency.num_activations,
            scheduler.num_reused_tokens,
            self._num_steps,
            {part: size for part, size in parts.items() if size},
            str(engine.device),
        )


def _put(events: Sequence[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.events.put_nowait((job.choice, event))

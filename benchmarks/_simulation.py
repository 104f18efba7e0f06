"""The real scheduler over time that is computed: no model, no threads, seconds in milliseconds.

A simulation takes arrivals, a cost for steps and one for activations, and drives `Scheduler` as the
engine does. What a step takes may be measured on a device; then long traces can be replayed that
nobody could wait for.
"""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeruntime.kv_cache import BlockPool, blocks_for
from moeruntime.request import SamplingParams
from moeruntime.residency import SlotTable
from moeruntime.scheduler import Chunk, Scheduler
from moeruntime.sequence import Sequence as TokenSequence
from moeruntime.waiting import ArrivalOrder, WaitingRoom

__all__ = [
    "Arrival",
    "Clients",
    "Clock",
    "Served",
    "percentile",
    "poisson",
    "read_trace",
    "simulate",
]

StepTime = Callable[[int, int, int], float]
"""(sequences that decode, prompt tokens, variants in the step) -> seconds."""


class Clock:
    """Simulated seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(frozen=True, order=True)
class Arrival:
    """One request; `num_new` tokens are generated, whatever they are."""

    at_s: float
    variant: str
    num_prompt: int
    num_new: int


@dataclass(frozen=True)
class Clients:
    """Callers who each send their next request when the last was answered, between two times."""

    variant: str
    count: int
    num_prompt: int
    num_new: int
    from_s: float
    until_s: float


@dataclass(frozen=True)
class Served:
    """What became of one request, in seconds of the simulation."""

    arrival: Arrival
    admitted_s: float
    first_s: float
    last_s: float

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.arrival.at_s

    @property
    def turnaround_s(self) -> float:
        return self.last_s - self.arrival.at_s

    @property
    def service_s(self) -> float:
        """Turnaround without the time in the queue."""
        return self.last_s - self.admitted_s

    @property
    def tpot_s(self) -> float | None:
        others = self.arrival.num_new - 1
        return (self.last_s - self.first_s) / others if others else None


class _Slots:
    """Residency of a simulated device: an activation takes its time, one after the other."""

    def __init__(self, num_slots: int, activation_s: float, clock: Clock) -> None:
        self._table = SlotTable(num_slots)
        self._activation_s = activation_s
        self._clock = clock
        self._arrives_s: dict[str, float] = {}
        self._free_s = 0.0
        self.num_activations = 0

    def admit(self, variant: str) -> bool:
        held = self._table.hold(variant)
        if held is None:
            return False
        if held[1]:
            self.num_activations += 1
            self._free_s = max(self._free_s, self._clock.now_s) + self._activation_s
            self._arrives_s[variant] = self._free_s
        return True

    def release(self, variant: str) -> None:
        self._table.release(variant)

    def ready(self, variant: str) -> bool:
        return self._arrives_s.get(variant, 0.0) <= self._clock.now_s

    def wait_s(self, variants: Iterable[str]) -> float:
        """How long a step of these waits for weights."""
        return max((self._arrives_s.get(one, 0.0) for one in variants), default=0.0)


def simulate(
    arrivals: Iterable[Arrival],
    step_s: StepTime,
    *,
    clock: Clock,
    waiting: WaitingRoom | None = None,
    clients: Sequence[Clients] = (),
    num_slots: int = 64,
    activation_s: float = 0.0,
    num_blocks: int = 1 << 16,
    max_sequences: int = 32,
    max_step_tokens: int = 2048,
) -> list[Served]:
    """Serve everything; returns it in the order in which it ended.

    Args:
        arrivals: in any order.
        step_s: what steps take; also told to a waiting room that learns.
        clock: starts where it stands; the waiting room must use the same.
        waiting: None takes requests as they come.
        clients: closed loops beside the arrivals.
        num_slots: resident variants.
        activation_s: what bringing another one takes.
        num_blocks: of the cache.
        max_sequences, max_step_tokens: as of an engine.
    """
    slots = _Slots(num_slots, activation_s, clock)
    waiting = ArrivalOrder() if waiting is None else waiting
    scheduler = Scheduler(
        BlockPool(num_blocks),
        slots,
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
        prefix_cache=False,
        waiting=waiting,
    )
    observe: Callable[[float], None] = getattr(waiting, "observe", lambda elapsed_s: None)
    coming = list(arrivals)
    loops = {one.variant: one for one in clients}
    for one in clients:
        coming += [Arrival(one.from_s, one.variant, one.num_prompt, one.num_new)] * one.count
    heapq.heapify(coming)
    alive: dict[int, tuple[Arrival, TokenSequence]] = {}
    admitted_s: dict[int, float] = {}
    first_s: dict[int, float] = {}
    served: list[Served] = []
    next_id = 0
    while coming or alive:
        if not alive:
            clock.now_s = max(clock.now_s, coming[0].at_s)
        while coming and coming[0].at_s <= clock.now_s:
            arrival = heapq.heappop(coming)
            params = SamplingParams(max_tokens=arrival.num_new)
            sequence = TokenSequence(next_id, arrival.variant, range(arrival.num_prompt), params)
            assert sequence.num_blocks_needed <= num_blocks, blocks_for(arrival.num_prompt)
            scheduler.add(sequence)
            alive[next_id] = (arrival, sequence)
            next_id += 1
        chunks = scheduler.schedule()
        assert chunks, "work there is, and none of it was chosen"
        for chunk in chunks:
            admitted_s.setdefault(chunk.sequence.request_id, clock.now_s)
        elapsed_s = _elapsed_s(chunks, step_s)
        variants = {chunk.sequence.variant for chunk in chunks}
        clock.now_s = max(clock.now_s, slots.wait_s(variants)) + elapsed_s
        observe(elapsed_s)
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_cached += chunk.num_tokens
            if sequence.num_pending:
                continue
            number = sequence.request_id
            first_s.setdefault(number, clock.now_s)
            sequence.output_ids.append(0)
            if len(sequence.output_ids) < sequence.sampling.max_tokens:
                continue
            scheduler.remove(sequence)
            arrival, _ = alive.pop(number)
            served.append(Served(arrival, admitted_s[number], first_s[number], clock.now_s))
            loop = loops.get(arrival.variant)
            if loop is not None and clock.now_s < loop.until_s:
                heapq.heappush(
                    coming, Arrival(clock.now_s, loop.variant, loop.num_prompt, loop.num_new)
                )
    return served


def _elapsed_s(chunks: Sequence[Chunk], step_s: StepTime) -> float:
    decodes = sum(chunk.sequence.num_pending == 1 for chunk in chunks)
    tokens = sum(chunk.num_tokens for chunk in chunks) - decodes
    return step_s(decodes, tokens, len({chunk.sequence.variant for chunk in chunks}))


def poisson(
    variants: Sequence[str],
    rate_per_s: float,
    until_s: float,
    *,
    seed: int,
    num_prompt: tuple[int, int],
    num_new: tuple[int, int],
) -> list[Arrival]:
    """Independent arrivals at each variant; lengths are uniform between two bounds, inclusive."""
    arrivals = []
    for idx, variant in enumerate(variants):
        rng = random.Random(1000 * seed + idx)
        at_s = rng.expovariate(rate_per_s)
        while at_s < until_s:
            sizes = rng.randint(*num_prompt), rng.randint(*num_new)
            arrivals.append(Arrival(at_s, variant, *sizes))
            at_s += rng.expovariate(rate_per_s)
    return sorted(arrivals)


def read_trace(path: Path) -> list[Arrival]:
    """Arrivals that were recorded: one JSON list [at_s, variant, num_prompt, num_new] a line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Arrival(*json.loads(line)) for line in lines]


def percentile(values: Iterable[float], part: float) -> float:
    """The smallest value that at least this part of the values does not exceed; nan of none."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, max(0, -(-int(part * 1e6) * len(ordered) // 10**6) - 1))]

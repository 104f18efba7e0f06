"""A thousand requests that come, go and give up; the same on every device."""

from __future__ import annotations

import random
from dataclasses import dataclass

from moeruntime import Engine, Output, Request, SamplingParams
from moeruntime.kv_cache import BLOCK_TOKENS
from moeruntime.synthetic import SyntheticSource

NUM_REQUESTS = 1000
NUM_VARIANTS = 5
VOCAB_SIZE = 512


@dataclass(frozen=True)
class Result:
    """What came of the requests that were not aborted, by their place in the list."""

    outputs: dict[int, Output]
    num_aborted: int
    num_activations: int
    num_reused_tokens: int


def make_requests(seed: int) -> list[Request]:
    """Random variants and lengths; half of the prompts begin like others do."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(VOCAB_SIZE) for _ in range(2 * BLOCK_TOKENS)] for _ in range(3)]
    requests = []
    for _ in range(NUM_REQUESTS):
        start = rng.choice(beginnings) if rng.random() < 0.5 else []
        prompt = [*start, *(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20)))]
        params = SamplingParams(
            max_tokens=rng.randint(1, 5),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            seed=rng.randrange(2**32),
        )
        requests.append(Request(f"v{rng.randrange(NUM_VARIANTS)}", prompt, params))
    return requests


def run_solo(requests: list[Request], device: str) -> list[Output]:
    """Each request in an engine of its own company, without anything to reuse."""
    source = SyntheticSource("mixtral-tiny", num_variants=NUM_VARIANTS)
    with Engine(source, device=device, dtype="float32", prefix_cache=False) as engine:
        return [engine.generate([request])[0] for request in requests]


def run_together(requests: list[Request], device: str, seed: int) -> Result:
    """All of them through two slots and a small cache, with aborts; nothing may be left."""
    rng = random.Random(seed)
    source = SyntheticSource("mixtral-tiny", num_variants=NUM_VARIANTS)
    outputs: dict[int, Output] = {}
    aborted: set[int] = set()
    with Engine(
        source,
        device=device,
        dtype="float32",
        resident=2,
        kept_layers=1,
        max_sequences=24,
        max_step_tokens=128,
        cache_bytes=600_000,
    ) as engine:
        num_blocks = engine.num_free_blocks
        assert num_blocks < 24 * 4, "the cache must be too small for all that may run"
        left = list(requests)
        alive: list[int] = []
        while left or not engine.scheduler.idle:
            for _ in range(min(len(left), rng.choice([0, 2, 5, 20]))):
                alive.append(engine.submit(left.pop(0)))
            if alive and rng.random() < 0.4:
                victim = alive.pop(rng.randrange(len(alive)))
                engine.abort(victim)
                aborted.add(victim)
            for delta in engine.step():
                if delta.output is not None:
                    outputs[delta.request_id] = delta.output
                    alive.remove(delta.request_id)
        assert not alive
        assert engine.num_free_blocks == num_blocks
        assert engine.residency.num_held == 0
        assert sorted([*outputs, *aborted]) == list(range(len(requests)))
        return Result(
            outputs,
            len(aborted),
            engine.residency.num_activations,
            engine.scheduler.num_reused_tokens,
        )

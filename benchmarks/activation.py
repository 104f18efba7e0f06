"""What it costs to answer for another variant: time to first token, resident and cold.

Physics: a resident variant costs nothing, it is another row of the same tensors. A cold one must be
copied from pinned host memory: its bytes over the measured bandwidth are the floor. The copy runs
in the order of the layers beside the prompt, so a long prompt should hide it. The published way
moves unpinned tensors out with .to("cpu") and in with .to("cuda"), one by one, and is measured too.

Run: python benchmarks/activation.py --synthetic mixtral-8x7b [--prompts 128 1024] [--kept-layers 0]
     python benchmarks/activation.py --artifact PACK
Prompts are random tokens, new ones each time. Two variants are resident, the others cold.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterable, Iterator
from itertools import cycle
from pathlib import Path

import torch
from _common import cpu_name, print_json

from moeruntime import Engine, Request, SamplingParams
from moeruntime.errors import UsageError
from moeruntime.hostmemory import HostMemory
from moeruntime.pack import Pack, WeightSource
from moeruntime.synthetic import SYNTHETIC_MODELS, SyntheticSource

RESIDENT = 2
COPY_BYTES = 2**30


class Clock:
    """Times to first token of requests that run alone."""

    def __init__(self, engine: Engine, num_tokens: int) -> None:
        self._engine = engine
        self._num_tokens = num_tokens
        self._random = random.Random(num_tokens)

    def ttft_ms(self, variant: str) -> float:
        vocab = self._engine.source.manifest.config.vocab_size
        prompt = [self._random.randrange(vocab) for _ in range(self._num_tokens)]
        synchronize(self._engine.device)
        start_s = time.perf_counter()
        self._engine.submit(Request(variant, prompt, SamplingParams(max_tokens=1)))
        while not self._engine.step():
            pass
        return (time.perf_counter() - start_s) * 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(engine: Engine, num_tokens: int, repeats: int) -> dict[str, float]:
    """Medians over `repeats` of each situation, in turn, so that drift meets all of them."""
    clock = Clock(engine, num_tokens)
    first, second, *cold = engine.source.manifest.variant_names
    coming: Iterator[str] = cycle(cold)
    times: dict[str, list[float]] = {"same": [], "after_another": [], "cold": []}
    for number in range(repeats + 1):
        # Both are brought back by requests that are not counted; then they are resident.
        for variant in (first, second, first):
            clock.ttft_ms(variant)
        same = clock.ttft_ms(first)
        clock.ttft_ms(second)
        after_another = clock.ttft_ms(first)
        before = engine.residency.num_activations
        activated = clock.ttft_ms(next(coming))
        assert engine.residency.num_activations == before + 1
        if number:  # the first round warms up
            times["same"].append(same)
            times["after_another"].append(after_another)
            times["cold"].append(activated)
    return {what: statistics.median(values) for what, values in times.items()}


def copy_floor_ms(engine: Engine) -> tuple[float, float]:
    """The least time in which one activation's bytes come from pinned memory, and the rate."""
    memory = HostMemory(COPY_BYTES)
    memory.pin()
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=engine.device)
    times_s = []
    for _ in range(6):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        target.copy_(memory.data, non_blocking=True)
        torch.cuda.synchronize()
        times_s.append(time.perf_counter() - start_s)
    rate = COPY_BYTES / statistics.median(times_s[1:])
    return engine.residency.activation_bytes / rate * 1e3, rate / 1e9


def published_ms(engine: Engine, repeats: int) -> float:
    """One variant's tensors to the host and another's to the device, each by itself, unpinned."""
    shapes = engine.source.manifest.config.non_expert_shapes()
    here = [
        torch.ones(shape, dtype=engine.dtype, device=engine.device) for shape in shapes.values()
    ]
    there = [torch.ones(shape, dtype=engine.dtype) for shape in shapes.values()]
    times_ms = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        evicted = [tensor.to("cpu") for tensor in here]
        here.clear()
        here = [tensor.to(engine.device) for tensor in there]
        torch.cuda.synchronize()
        times_ms.append((time.perf_counter() - start_s) * 1e3)
        there = evicted
    return statistics.median(times_ms)


def opened(arguments: argparse.Namespace) -> WeightSource:
    if arguments.artifact is not None:
        return Pack(arguments.artifact)
    return SyntheticSource(
        arguments.synthetic, num_variants=arguments.variants, code=arguments.code
    )


def report(ttft: dict[int, dict[str, float]], extra: dict[str, float]) -> Iterable[str]:
    yield "prompt   same variant   after another   cold   (ms to the first token)"
    for num_tokens, row in ttft.items():
        yield (
            f"{num_tokens:6d} {row['same']:14.2f} {row['after_another']:15.2f} {row['cold']:6.1f}"
            f"   cold is {row['cold'] / row['same']:.2f}x, {row['cold'] - row['same']:+.1f} ms"
        )
    for what, value in extra.items():
        yield f"{what} {value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to first token, resident and cold.")
    parser.add_argument("--artifact", type=Path, default=None)
    parser.add_argument("--synthetic", choices=SYNTHETIC_MODELS, default="mixtral-mini")
    parser.add_argument("--variants", type=int, default=4)
    parser.add_argument("--code", default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--kept-layers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    source = opened(arguments)
    if len(source.manifest.variants) <= RESIDENT:
        raise UsageError(f"{source.root}: {RESIDENT} variants are resident, none would be cold")
    longest = max(arguments.prompts)
    with Engine(
        source,
        device=arguments.device,
        dtype=arguments.dtype,
        resident=RESIDENT,
        max_step_tokens=max(2048, longest),
        cache_bytes=2**30,
        kept_layers=arguments.kept_layers,
    ) as engine:
        ttft = {count: measure(engine, count, arguments.repeats) for count in arguments.prompts}
        extra = {"activation_mb": engine.residency.activation_bytes / 1e6}
        if engine.device.type == "cuda":
            extra["copy_floor_ms"], extra["pinned_gb_per_s"] = copy_floor_ms(engine)
            extra["published_ms"] = published_ms(engine, min(3, arguments.repeats))
            name = torch.cuda.get_device_name(engine.device)
        else:
            name = cpu_name()
    print(f"{source.root} on {name}")
    print(*report(ttft, extra), sep="\n")
    print_json(
        {
            "benchmark": "activation",
            "source": str(source.root),
            "device": name,
            "kept_layers": arguments.kept_layers,
            "ttft_ms": {str(count): row for count, row in ttft.items()},
            **extra,
        }
    )


if __name__ == "__main__":
    main()

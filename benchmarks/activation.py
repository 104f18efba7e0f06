"""What it costs to answer for another variant: time to first token, resident and cold.

Physics: a resident variant costs nothing, it is another row of the same tensors. A cold one must be
copied from pinned host memory: its bytes over the measured bandwidth are the floor. The copy runs
in the order of the layers beside the prompt, so a long prompt should hide it. The published way
moves unpinned tensors out with .to("cpu") and in with .to("cuda"), one by one, and is measured too.

Run: python benchmarks/activation.py --synthetic mixtral-8x7b [--prompts 128 1024] [--kept-layers 4]
     python benchmarks/activation.py --artifact PACK
Prompts are random tokens, new ones each time. Two variants are resident, the others cold.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from _common import print_json

from moeruntime import Engine
from moeruntime.bench.ceilings import measure_ceilings
from moeruntime.bench.machine import device_name
from moeruntime.bench.prompts import TtftRow, measure_ttft
from moeruntime.errors import UsageError
from moeruntime.loading import resolve_device, resolve_dtype
from moeruntime.pack import Pack, WeightSource
from moeruntime.synthetic import SYNTHETIC_MODELS, SyntheticSource

RESIDENT = 2


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


def report(rows: list[TtftRow], extra: dict[str, float]) -> Iterable[str]:
    yield "prompt   same variant   after another   cold   (ms to the first token)"
    for row in rows:
        assert row.after_another_s is not None and row.cold_s is not None
        yield (
            f"{row.tokens:6d} {row.same_s * 1e3:14.2f} {row.after_another_s * 1e3:15.2f} "
            f"{row.cold_s * 1e3:6.1f}   cold is {row.cold_s / row.same_s:.2f}x, "
            f"{(row.cold_s - row.same_s) * 1e3:+.1f} ms"
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
    parser.add_argument("--kept-layers", type=int, default=None, help="default: the engine's")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    source = opened(arguments)
    if len(source.manifest.variants) <= RESIDENT:
        raise UsageError(f"{source.root}: {RESIDENT} variants are resident, none would be cold")
    device = resolve_device(arguments.device)
    ceilings = measure_ceilings(
        device, resolve_dtype(arguments.dtype, device, source.manifest.expert_dtype)
    )
    with Engine(
        source,
        device=arguments.device,
        dtype=arguments.dtype,
        resident=RESIDENT,
        max_step_tokens=max(2048, *arguments.prompts),
        cache_bytes=2**30,
        kept_layers=arguments.kept_layers,
    ) as engine:
        rows = [
            measure_ttft(engine, ceilings, count, repeats=arguments.repeats)
            for count in arguments.prompts
        ]
        extra = {
            "kept_layers": float(engine.memory.kept_layers),
            "activation_mb": engine.residency.activation_bytes / 1e6,
        }
        if ceilings.copy_bytes is not None:
            extra["pinned_gb_per_s"] = ceilings.copy_bytes / 1e9
            extra["copy_floor_ms"] = engine.residency.activation_bytes / ceilings.copy_bytes * 1e3
            extra["published_ms"] = published_ms(engine, min(3, arguments.repeats))
    name = device_name(device)
    print(f"{source.root} on {name}")
    print(*report(rows, extra), sep="\n")
    print_json(
        {
            "benchmark": "activation",
            "source": str(source.root),
            "device": name,
            "rows": [asdict(row) for row in rows],
            **extra,
        }
    )


if __name__ == "__main__":
    main()

"""Ceilings of the GPU at hand, measured in the run that is compared with them."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl


@triton.jit
def _read_kernel(x, out, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (BLOCK * ROUNDS)
    total = tl.zeros((BLOCK,), tl.int32)
    for part in tl.range(0, ROUNDS, num_stages=4):
        total += tl.load(x + start + part * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total))


def median_s(work: Callable[[], object], *, repeats: int = 15, warm_up: int = 3) -> float:
    """Median seconds of one call on the device."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def graph_s(work: Callable[[], object], *, repeats: int = 9) -> float:
    """Median seconds of `work` without the host's part: its launches captured and replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return median_s(graph.replay, repeats=repeats, warm_up=2)


def read_bandwidth() -> float:
    """Bytes a second of the best plain reader found: what a decode step cannot exceed."""
    x = torch.randint(-(2**31), 2**31 - 1, (2**30,), dtype=torch.int32, device="cuda")
    best = 0.0
    for block, rounds, warps in ((4096, 16, 4), (8192, 8, 8), (4096, 64, 8), (2048, 32, 4)):
        programs = len(x) // (block * rounds)
        out = torch.empty(programs, dtype=torch.int32, device="cuda")

        def work(
            block: int = block,
            rounds: int = rounds,
            programs: int = programs,
            out: torch.Tensor = out,
            warps: int = warps,
        ) -> None:
            _read_kernel[(programs,)](x, out, BLOCK=block, ROUNDS=rounds, num_warps=warps)

        best = max(best, x.nbytes / median_s(work))
    return best


def gemm_rate() -> float:
    """Floating-point operations a second of an 8192^3 bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_s(lambda: a @ b)


def pinned_bandwidth() -> float:
    """Bytes a second from pinned host memory to the device."""
    host = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    return host.nbytes / median_s(lambda: device.copy_(host, non_blocking=True), repeats=7)

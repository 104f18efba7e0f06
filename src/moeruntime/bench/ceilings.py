"""What the machine can do at best, measured in the run that is compared with it.

A decode step is bytes: it cannot be faster than the best plain reader of its memory. A long prompt
is products: it cannot beat a large one of the library's. A load or an activation is a copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from moeruntime.bench.machine import CUDA, median_s
from moeruntime.hostmemory import HostMemory
from moeruntime.loader import BUFFER_BYTES, MAX_THREADS

__all__ = [
    "Ceilings",
    "gemm_rate",
    "measure_ceilings",
    "pinned_bandwidth",
    "read_bandwidth",
    "read_files",
]

# Far more than any cache holds.
READ_BYTES = {"cuda": 2**32, "cpu": 2**28}
COPY_BYTES = 2**30
GEMM_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates a second.

    Attributes:
        read_bytes: of the device's memory, by the best plain reader found.
        gemm_flops: of one large product in the compute dtype; a multiplication and an addition are
            two operations.
        copy_bytes: from pinned host memory to the device; None on a CPU, which has no such copy.
    """

    read_bytes: float
    gemm_flops: float
    copy_bytes: float | None


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure them all and give back the memory that took."""
    if device.type != "cuda":
        return Ceilings(read_bandwidth(device), gemm_rate(device, dtype), None)
    with torch.cuda.device(device):  # Triton launches on the current device
        copy_bytes = pinned_bandwidth(device)
        ceilings = Ceilings(read_bandwidth(device), gemm_rate(device, dtype), copy_bytes)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return ceilings


def read_bandwidth(device: torch.device = CUDA) -> float:
    """Bytes a second of the best plain reader found."""
    num_bytes = READ_BYTES[device.type]
    readers = _cuda_readers if device.type == "cuda" else _cpu_readers
    return max(num_bytes / median_s(work, device) for work in readers(num_bytes, device))


def gemm_rate(device: torch.device = CUDA, dtype: torch.dtype = torch.bfloat16) -> float:
    """Floating-point operations a second of a square product."""
    size = GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return float(2 * size**3 / median_s(lambda: a @ b, device))


def pinned_bandwidth(device: torch.device = CUDA) -> float:
    """Bytes a second from pinned host memory to the device."""
    host = HostMemory(COPY_BYTES)
    host.pin()
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    copy_s = median_s(lambda: target.copy_(host.data, non_blocking=True), device, repeats=7)
    return COPY_BYTES / copy_s


def read_files(paths: Sequence[Path], *, fresh: bool = False) -> int:
    """Read whole files as the loader does, by as many threads and in pieces of the same size.

    Args:
        paths: the files.
        fresh: into new memory; otherwise into one buffer a thread, used again and again.

    Returns:
        Bytes read.
    """
    num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    files = [os.open(path, os.O_RDONLY) for path in paths]
    pieces = [
        (fd, start)
        for fd, path in zip(files, paths, strict=True)
        for start in range(0, path.stat().st_size, BUFFER_BYTES)
    ]
    num_buffers = len(pieces) if fresh else num_threads
    whole = HostMemory(num_buffers * BUFFER_BYTES).data.numpy().data
    buffers = [whole[start : start + BUFFER_BYTES] for start in range(0, len(whole), BUFFER_BYTES)]

    def read(idx: int) -> int:
        return sum(
            os.preadv(fd, [buffers[number % num_buffers]], start)
            for number, (fd, start) in list(enumerate(pieces))[idx::num_threads]
        )

    try:
        with ThreadPoolExecutor(num_threads) as threads:
            return sum(threads.map(read, range(num_threads)))
    finally:
        for fd in files:
            os.close(fd)


def _cuda_readers(num_bytes: int, device: torch.device) -> list[Callable[[], object]]:
    from moeruntime.bench.read_kernel import SHAPES, read

    x = torch.randint(-(2**31), 2**31 - 1, (num_bytes // 4,), dtype=torch.int32, device=device)
    out = torch.empty(len(x) // min(a * b for a, b, _ in SHAPES), dtype=torch.int32, device=device)
    return [partial(read, x, shape, out=out) for shape in SHAPES]


def _cpu_readers(num_bytes: int, device: torch.device) -> list[Callable[[], object]]:
    x = torch.ones(num_bytes // 4, device=device)
    vector = torch.ones(4096, device=device)
    return [x.sum, x.amax, lambda: x.view(-1, len(vector)) @ vector]

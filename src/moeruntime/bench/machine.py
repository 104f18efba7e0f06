"""The device at hand: its name, and how long something takes on it."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moeruntime.capture import capture

__all__ = ["cpu_name", "device_name", "graph_s", "median_s", "peak_bytes", "synchronize"]

CUDA = torch.device("cuda")
LEAST_REPEATS = 3


def cpu_name() -> str:
    """The processor, as the system calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def device_name(device: torch.device) -> str:
    """What the device is sold as."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def peak_bytes(device: torch.device) -> int:
    """The most that was ever taken: by the allocator on CUDA, by the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_s(
    work: Callable[[], object],
    device: torch.device = CUDA,
    *,
    repeats: int = 15,
    warm_up: int = 3,
    most_s: float = 10.0,
) -> float:
    """Median seconds of one call, on CUDA by the device's own clock.

    Args:
        work: what to call.
        device: where it runs.
        repeats: calls that are timed.
        warm_up: calls before that.
        most_s: no further call once all of them have taken so long and three are timed.
    """
    started_s = time.perf_counter()
    for _ in range(warm_up):
        work()
    synchronize(device)
    times_s: list[float] = []
    while len(times_s) < repeats and (
        len(times_s) < LEAST_REPEATS or time.perf_counter() - started_s < most_s
    ):
        times_s.append(_once_s(work, device))
    return statistics.median(times_s)


def _once_s(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start_s = time.perf_counter()
        work()
        return time.perf_counter() - start_s
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(torch.cuda.current_stream(device))
    work()
    stop.record(torch.cuda.current_stream(device))
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def graph_s(work: Callable[[], object], *, repeats: int = 9) -> float:
    """Median seconds of `work` without the host's part: its launches captured and replayed."""
    return median_s(capture(work).replay, repeats=repeats, warm_up=2)

"""Recording launches in a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["capture"]


def capture(
    work: Callable[[], object], *, pool: Any = None, device: torch.device | None = None
) -> torch.cuda.CUDAGraph:
    """Do `work` once, which compiles what has to be compiled, then record its launches.

    Args:
        work: the same launches each time, and nothing that a capture forbids.
        pool: memory that it shares with other graphs, as `CUDAGraph.pool` has it.
        device: the current one, unless given.
    """
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        work()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with _no_collection(), torch.cuda.graph(graph, pool=pool):
        work()
    return graph


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep what an engine before left from being freed: a capture does not survive that."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

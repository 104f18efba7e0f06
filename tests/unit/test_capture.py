"""How launches are recorded, without a device: streams and graphs are stand-ins."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moeruntime.capture import capture


class Stream:
    def __init__(self, device: object = None) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class Cuda:
    """What is recorded, and what happens meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = Stream()
        self.running_on: Stream | None = None
        self.recording: object = None
        self.pool: Any = None
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.running_on = stream
        yield
        self.running_on = None

    @contextmanager
    def graph(self, graph: object, pool: Any) -> Iterator[None]:
        self.recording, self.pool = graph, pool
        yield
        self.recording = None


def test_work_is_done_once_beside_and_once_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    seen: list[tuple[Stream | None, object]] = []
    graph = capture(lambda: seen.append((cuda.running_on, cuda.recording)), pool="shared")
    (side, nothing), (no_stream, recorded) = seen
    assert side is not None and side.waited_for == [cuda.current]
    assert cuda.current.waited_for == [side]
    assert (nothing, no_stream) == (None, None)
    assert recorded is graph and cuda.pool == "shared"


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_while_launches_are_recorded(
    monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    cuda = Cuda(monkeypatch)

    def work() -> None:
        assert gc.isenabled() == (enabled and cuda.recording is None)
        if cuda.recording is not None:
            raise RuntimeError("no room")

    was_enabled = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(RuntimeError, match="no room"):
            capture(work)
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if was_enabled else gc.disable()

"""What a step of the fused decoder wants of CUDA, in place of it: things that are done at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moeruntime.models import Decoder
from moeruntime.models.build import build_model

if TYPE_CHECKING:
    from moeruntime.models.fused import FusedDecoder
    from moeruntime.models.step_graphs import StepGraphs

__all__ = ["build_fused", "build_reference", "install"]


def install(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Have the fused decoder and its graphs work on CPU tensors, but for their kernels."""
    from moeruntime.kernels import chain, upload
    from moeruntime.models import step_graphs

    chain.chained.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(chain, "chains", lambda capability: capability >= (9, 0))
    monkeypatch.setattr(upload, "_pinned", lambda num: torch.empty(num, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(step_graphs, "capture", _Graph)


def build_reference(*parts: Any, **sizes: int) -> tuple[Decoder, None]:
    """In place of `build_model`, which gives a GPU the fused decoder."""
    model, _ = build_model(*parts, **sizes)
    return Decoder(model.config, model.weights, parts[2], model.faces_VLE, model.cache), None


def build_fused(*parts: Any, **sizes: int) -> tuple[FusedDecoder, StepGraphs]:
    """In place of `build_model`, which gives a CPU the reference decoder."""
    from moeruntime.models.fused import FusedDecoder
    from moeruntime.models.step_graphs import StepGraphs

    reference, _ = build_reference(*parts, **sizes)
    model = FusedDecoder(
        reference.config,
        reference.weights,
        reference.experts,
        reference.faces_VLE,
        reference.cache,
    )
    return model, StepGraphs(model, **sizes)


class _Event:
    """Of a device that has always done what it was asked to."""

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Graph:
    """In place of what `capture` makes: launches are not recorded, but made when they are due."""

    def __init__(self, work: Callable[[], object], **_: object) -> None:
        self.replay = work

    def pool(self) -> None:
        return None

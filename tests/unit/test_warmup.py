"""The warm-up leaves an engine as it found it."""

from __future__ import annotations

import pytest

from moeruntime import Engine
from moeruntime.synthetic import SyntheticSource
from moeruntime.warmup import warm_up


def test_a_token_of_every_variant_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SyntheticSource("mixtral-tiny", num_variants=3)
    with Engine(source, device="cpu") as engine:
        ran: list[str] = []
        submit = engine.submit
        monkeypatch.setattr(engine, "submit", lambda one: (ran.append(one.variant), submit(one))[1])
        warm_up(engine)
        assert ran == ["v0", "v1", "v2"]
        assert engine.scheduler.idle
        assert engine.num_free_blocks == engine.memory.num_blocks

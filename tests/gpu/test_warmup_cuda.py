"""After the warm-up nobody waits for a compiler or for a graph to be captured."""

from __future__ import annotations

import gc
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from moeruntime import Engine, Request, SamplingParams, synthetic
from moeruntime.kernels import nvrtc
from moeruntime.synthetic import SyntheticSource
from moeruntime.warmup import warm_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("code", ["bf16", "4+2"])
@pytest.mark.parametrize(("dtype", "resident"), [("bfloat16", 3), ("bfloat16", 2), ("float32", 3)])
def test_nothing_is_compiled_or_captured_once_warm(
    monkeypatch: pytest.MonkeyPatch, code: str, dtype: str, resident: int
) -> None:
    """Where a variant is not resident, its prompts begin without a graph."""
    import triton

    source = SyntheticSource("mixtral-mini", num_variants=3, code=code)
    with Engine(source, device="cuda", dtype=dtype, max_sequences=24, resident=resident) as engine:
        warm_up(engine)
        assert engine.graphs is not None
        assert engine.scheduler.idle

        compiled: list[str] = []

        def note(**what: Any) -> None:
            compiled.append(what["repr"])

        def captured(*_: object) -> None:
            raise AssertionError("a graph is captured")

        monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
        monkeypatch.setattr(torch.cuda, "graph", captured)
        rng = random.Random(1)
        vocab_size = source.manifest.config.vocab_size
        for number in range(150):
            length = rng.choice([1, 2, 15, 16, 17, 33, 64, 100, 130, 257, 400])
            prompt = [rng.randrange(vocab_size) for _ in range(length)]
            params = SamplingParams(
                max_tokens=rng.randrange(1, 9),
                temperature=rng.choice([0.0, 0.8]),
                seed=number,
                logprobs=rng.choice([None, 2]),
                prompt_logprobs=rng.choice([None, None, 1]),
                ignore_eos=True,
            )
            engine.submit(Request(f"v{rng.randrange(3)}", prompt, params))
            for _ in range(rng.randrange(3)):
                engine.step()
        while not engine.scheduler.idle:
            engine.step()
        assert compiled == []


@pytest.mark.parametrize("num_variants", [1, 3])
def test_no_kernel_of_nested_experts_is_compiled_once_warm(
    monkeypatch: pytest.MonkeyPatch, num_variants: int
) -> None:
    # The least that the fast kernels serve; they are compiled by another compiler than Triton's.
    config = synthetic._scaled(hidden=1024, inner=2048, layers=1, vocab=512, context=4096)
    monkeypatch.setitem(synthetic.SYNTHETIC_MODELS, "fast", config)
    source = SyntheticSource("fast", num_variants=num_variants, code="4+2")
    nvrtc._loaded.cache_clear()  # whatever other tests left there
    with Engine(source, device="cuda", max_sequences=8) as engine:
        warm_up(engine)
        compile_file = nvrtc._compile
        compiled: list[dict[str, int]] = []

        def note(path: Path, defines: dict[str, int], capability: tuple[int, int]) -> bytes:
            compiled.append(defines)
            return compile_file(path, defines, capability)

        monkeypatch.setattr(nvrtc, "_compile", note)
        assert nvrtc._loaded.cache_info().currsize > 3, "nothing was compiled: not what is meant"
        rng = random.Random(2)
        for length in (*range(1, 40), *range(40, 1100, 23)):
            names = [f"v{idx}" for idx in range(num_variants)]
            some = rng.sample(names, rng.randint(1, num_variants))
            params = SamplingParams(max_tokens=2)
            engine.generate([Request(name, [1] * length, params) for name in some])
        assert compiled == []


def test_a_capture_survives_what_an_engine_before_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Left:
        """Nobody's, and only a collection finds that out."""

        def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
            self.graph, self.itself = graph, self

    source = SyntheticSource("mixtral-mini", num_variants=1)
    with Engine(source, device="cuda", max_sequences=2) as engine:
        warm_up(engine)
        assert engine.graphs is not None
        left = [step.graph for step in engine.graphs._steps.values()]
        engine.graphs._steps.clear()
    with Engine(source, device="cuda", max_sequences=2) as engine:
        assert engine.graphs is not None
        forward = engine.graphs.forward

        def leave_and_go_on(*arguments: Any, **options: Any) -> None:
            if left and torch.cuda.is_current_stream_capturing():
                Left(left.pop())
            forward(*arguments, **options)

        monkeypatch.setattr(engine.graphs, "forward", leave_and_go_on)
        before = gc.get_threshold()
        gc.set_threshold(1)
        try:
            warm_up(engine)
        finally:
            gc.set_threshold(*before)
        assert left == [], "captures met what was left"


def test_an_engine_that_nobody_has_is_gone_at_once() -> None:
    source = SyntheticSource("mixtral-mini", num_variants=2, code="4+2")
    gc.disable()
    try:
        with Engine(source, device="cuda", max_sequences=2) as engine:
            warm_up(engine)
        parts = [weakref.ref(part) for part in (engine, engine.graphs, engine.model)]
        del engine
        assert [part() for part in parts] == [None] * 3
    finally:
        gc.enable()

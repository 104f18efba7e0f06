"""The fused decoder and its graphs against the reference decoder on the same device and weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_on_cpu
import moeruntime.engine
from cuda_stand_ins import build_fused, build_reference
from kernel_fixtures import ON_CPU, ON_CUDA, Allow
from moeruntime import Engine, Request, SamplingParams, synthetic
from moeruntime.kernels import attention_cuts
from moeruntime.loading import Loader, load_experts
from moeruntime.models import Batch, Decoder, step_buffers, step_graphs
from moeruntime.models import fused as fused_decoder
from moeruntime.models.batch import Span, token_groups
from moeruntime.models.experts import DecodedCache
from moeruntime.models.fused import FusedDecoder
from moeruntime.models.step_graphs import StepGraphs
from moeruntime.synthetic import SyntheticSource
from runtime_fixtures import assert_same_greedy, engine_logits

CODES = ("bf16", "4+0", "4+1", "4+2", "4+3", "3+4", "5+2")
# Float32 is what proves. In bfloat16 a random model's routers turn at the least rounding.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-1}
CASES = [
    *(
        pytest.param("cpu", "mixtral-tiny", code, dtype, marks=ON_CPU)
        for code, dtype in (("bf16", "float32"), ("4+2", "bfloat16"))
    ),
    pytest.param("cpu", "fast", "4+2", "bfloat16", marks=ON_CPU),
    *(
        pytest.param("cuda", model, code, dtype, marks=ON_CUDA)
        for model in ("mixtral-tiny", "mixtral-mini", "fast")
        for code in CODES
        for dtype in TOLERANCE
    ),
]
LENGTHS = {"cpu": (19, 1, 17), "cuda": (19, 1, 70)}


@pytest.fixture(autouse=True)
def fast_model(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least whose nested experts go the fast way, in bfloat16."""
    times = 1 if device.type == "cpu" else 2
    config = synthetic._scaled(1024, inner=1024 * times, layers=times, vocab=512, context=512)
    monkeypatch.setitem(synthetic.SYNTHETIC_MODELS, "fast", config)


class CopiedTokens(StepGraphs):
    """On a GPU the runner copies a step's tokens behind it, before the next one overwrites them."""

    def run(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        logits_TV, tokens_T = super().run(spans)
        return logits_TV, tokens_T.clone()

    def run_on(self, num_rows: int) -> tuple[Tensor, Tensor]:
        logits_TV, tokens_T = super().run_on(num_rows)
        return logits_TV, tokens_T.clone()


@pytest.fixture(autouse=True)
def fused(device: torch.device, allow: Allow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines have the fused decoder, wherever they are."""

    def build(*parts: Any, **sizes: int) -> tuple[FusedDecoder, StepGraphs]:
        for pool in parts[2]:
            allow(pool.tensors())
        model, _ = build_fused(*parts, **sizes)
        return model, CopiedTokens(model, **sizes)

    if device.type == "cpu":
        cuda_on_cpu.install(monkeypatch, num_multiprocessors=4)
        monkeypatch.setattr(moeruntime.engine, "build_model", build)


def assert_alike(actual: Tensor, expected: Tensor, dtype: str) -> None:
    """Of most rows in float32; in bfloat16 a token now and then goes to another expert."""
    difference_N = (actual.float() - expected.float()).norm(dim=-1)
    error_N = (difference_N / expected.float().norm(dim=-1)).sort().values
    part = {"float32": 2, "bfloat16": 3}[dtype]
    assert float(error_N[(len(error_N) - 1) // part]) <= TOLERANCE[dtype]


def load_reference(engine: Engine) -> Decoder:
    """The reference decoder over an engine's weights and cache.

    Experts are loaded once more: those that kernels read may have been rearranged.
    """
    manifest, model = engine.source.manifest, engine.model
    layers = range(manifest.config.num_layers)
    with Loader(engine.device) as loader:
        pools = [
            load_experts(engine.source, layer, engine.dtype, loader, DecodedCache(0))
            for layer in layers
        ]
    return Decoder(manifest.config, engine.residency.weights, pools, model.faces_VLE, model.cache)


@pytest.mark.parametrize(("device", "model", "code", "dtype"), CASES, indirect=["device"])
def test_prompts_and_decodes_of_mixed_variants(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, model: str, code: str, dtype: str
) -> None:
    """Three sequences of two variants: prompts, decodes, a prompt beside decodes, one variant."""
    monkeypatch.setattr(attention_cuts, "SPLIT_KEYS", 8)
    monkeypatch.setattr(step_graphs, "ALONE_ROWS", 1)
    source = SyntheticSource(model, num_variants=3, code=code)
    with Engine(source, device=device.type, dtype=dtype, max_sequences=8) as engine:
        cache = engine.model.cache
        reference = load_reference(engine)
        rng = random.Random(0)
        names = ("v0", "v2", "v2")
        for name in set(names):
            assert engine.residency.admit(name)
        lengths, tables = LENGTHS[device.type], ([0, 1], [2, 3], [4, 5, 6, 7, 8])
        assert engine.graphs is not None

        def spans(starts: tuple[int, ...], counts: tuple[int, ...]) -> list[Span]:
            return [
                Span(
                    engine.residency.slot(name),
                    int(name[1]),
                    [rng.randrange(source.manifest.config.vocab_size) for _ in range(count)],
                    start,
                    table,
                )
                for name, start, count, table in zip(names, starts, counts, tables, strict=True)
            ]

        def expected(step: list[Span]) -> tuple[Tensor, Tensor]:
            hidden_TH = reference.forward(Batch.build(step, engine.device))
            groups = token_groups(span.slot for span in step for _ in span.token_ids)
            return hidden_TH, reference.logits(hidden_TH, groups)

        prompts = spans((0, 0, 0), lengths)
        expected_TH, expected_TV = expected(prompts)

        def forget() -> None:
            for one in (*cache.keys, *cache.values):
                one.fill_(torch.nan)

        forget()
        batch = Batch.build(prompts, engine.device)
        assert_alike(engine.model.forward(batch), expected_TH, dtype)
        forget()
        assert_alike(engine.graphs.run(prompts)[0], expected_TV, dtype)

        at = lengths
        for counts in ((1, 1, 1), (1, 6, 1)):
            step = spans(at, counts)
            _, expected_TV = expected(step)
            before = [one.clone() for one in (*cache.keys, *cache.values)]
            logits_TV, tokens_T = engine.graphs.run(step)
            assert_alike(logits_TV, expected_TV, dtype)
            assert tokens_T.tolist() == logits_TV.argmax(dim=-1).tolist()
            # Nobody else's keys and values are touched, by rows that only fill the step up either.
            new = Batch.build(step, engine.device).cache_rows_T
            for one, old in zip((*cache.keys, *cache.values), before, strict=True):
                for cached in (one, old):
                    cached.flatten(0, 1)[new] = 0
                torch.testing.assert_close(one, old, rtol=0, atol=0, equal_nan=True)
            expected(step)  # puts back what was set to 0
            at = tuple(start + count for start, count in zip(at, counts, strict=True))
        alone = spans(at, (1, 1, 1))[1:]
        _, expected_TV = expected(alone)
        assert_alike(engine.graphs.run(alone)[0], expected_TV, dtype)
        # As a graph of its own, where variants have faces of their own.
        private = engine.model.max_faces > source.manifest.config.num_experts
        assert {kind.alone for kind in engine.graphs._steps} == {False, private}


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_CUDA)], indirect=True)
@pytest.mark.parametrize("code", ["4+0", "4+1", "4+2", "4+3"])
def test_a_prompt_of_many_tokens_a_face(device: torch.device, code: str) -> None:
    """Beside one of another variant whose faces get as many."""
    source = SyntheticSource("fast", num_variants=2, code=code)
    counts = (400, 500)
    with Engine(source, device=device.type, dtype="bfloat16", max_sequences=2) as engine:
        reference, rng = load_reference(engine), random.Random(3)
        vocab_size = source.manifest.config.vocab_size
        for name in ("v0", "v1"):
            assert engine.residency.admit(name)
        step = [
            Span(
                engine.residency.slot(f"v{idx}"),
                idx,
                rng.choices(range(vocab_size), k=count),
                0,
                list(range(idx * 32, idx * 32 + 32)),
            )
            for idx, count in enumerate(counts)
        ]
        batch = Batch.build(sorted(step, key=lambda span: span.slot), engine.device)
        actual_TH, expected_TH = engine.model.forward(batch), reference.forward(batch)
        assert_alike(actual_TH, expected_TH, "bfloat16")


def test_codes_are_decoded_a_few_faces_at_a_time(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of many tokens, whose products are the library's."""
    faces_at_once = 3
    config = synthetic._scaled(hidden=128, inner=128, layers=2, vocab=64, context=64)
    monkeypatch.setitem(synthetic.SYNTHETIC_MODELS, "coded", config)
    num_bytes = 2 * 2 * config.hidden_size * config.intermediate_size
    monkeypatch.setattr(step_buffers, "DECODED_BYTES", faces_at_once * num_bytes)
    source = SyntheticSource("coded", num_variants=2, code="4+1")
    with Engine(source, device=device.type, dtype="bfloat16", max_sequences=1) as engine:
        engine.model.decoded.fill_(torch.nan)
        reference = load_reference(engine)
        assert engine.residency.admit("v1")
        tokens = random.Random(1).choices(range(config.vocab_size), k=12)
        batch = Batch.build([Span(engine.residency.slot("v1"), 1, tokens, 0, [0])], engine.device)
        actual_TH, expected_TH = engine.model.forward(batch), reference.forward(batch)
        assert_alike(actual_TH, expected_TH, "bfloat16")


def test_many_tokens_of_plain_experts_are_the_librarys(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many that is."""
    monkeypatch.setattr(fused_decoder, "FEW_PAIRS", 30)
    source = SyntheticSource("mixtral-tiny", num_variants=2)
    with Engine(source, device=device.type, dtype="bfloat16", max_sequences=1) as engine:
        reference, slot = load_reference(engine), {}
        for name in ("v0", "v1"):
            assert engine.residency.admit(name)
            slot[name] = engine.residency.slot(name)
        tokens = random.Random(2).choices(range(source.manifest.config.vocab_size), k=16)
        for counts in ((4, 11), (4, 12)):  # 30 pairs and 32
            spans = [
                Span(slot[f"v{idx}"], idx, tokens[:count], 0, [idx])
                for idx, count in enumerate(counts)
            ]
            batch = Batch.build(sorted(spans, key=lambda span: span.slot), engine.device)
            actual_TH, expected_TH = engine.model.forward(batch), reference.forward(batch)
            assert_alike(actual_TH, expected_TH, "bfloat16")


def test_greedy_tokens_are_the_reference_decoders(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole engine, with more requests than it takes at once: steps are mixed, and run ahead."""
    source = SyntheticSource("mixtral-tiny", num_variants=3, code="3+4")
    requests = [
        Request(f"v{idx}", list(range(7 * idx, 9 * idx + 2)), SamplingParams(max_tokens=2 + idx))
        for idx in range(3)
    ]

    def engine() -> Engine:
        return Engine(source, device=device.type, dtype="float32", max_sequences=2)

    with engine() as fused:
        assert isinstance(fused.model, FusedDecoder) and fused.graphs is not None
        outputs = fused.generate(requests)
    monkeypatch.setattr(moeruntime.engine, "build_model", build_reference)
    with engine() as reference:
        for request, output in zip(requests, outputs, strict=True):
            expected = reference.generate([request])[0]

            def logits_after(ids: Sequence[int], variant: str = request.variant) -> Tensor:
                return engine_logits(reference, variant, ids, [len(ids)])[-1]

            assert_same_greedy(
                output.token_ids, expected.token_ids, logits_after, list(request.prompt)
            )

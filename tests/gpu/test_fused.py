"""The fused decoder and its graphs against the reference decoder on the same device and weights."""

from __future__ import annotations

import random

import pytest
import torch

from moeruntime import Engine, synthetic
from moeruntime.loading import Loader, load_experts
from moeruntime.models import Batch, Decoder
from moeruntime.models.batch import Span, token_groups
from moeruntime.models.experts import DecodedCache
from moeruntime.synthetic import SyntheticSource

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CODES = ("bf16", "4+0", "4+1", "4+2", "4+3", "3+4", "5+2")
# Float32 is what proves. In bfloat16 a random model's routers turn at the least rounding.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-1}


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(autouse=True)
def fast_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least whose nested experts go the fast way, in bfloat16."""
    config = synthetic._scaled(hidden=1024, inner=2048, layers=2, vocab=512, context=512)
    monkeypatch.setitem(synthetic.SYNTHETIC_MODELS, "fast", config)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the median row: in bfloat16 a token now and then goes to another expert."""
    difference_N = (actual.float() - expected.float()).norm(dim=-1)
    return float((difference_N / expected.float().norm(dim=-1)).median())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("model", ["mixtral-tiny", "mixtral-mini", "fast"])
def test_prompts_and_decodes_of_mixed_variants(model: str, code: str, dtype: str) -> None:
    """Three sequences of two variants: prompts first, then steps by graph, all at once."""
    source = SyntheticSource(model, num_variants=3, code=code)
    with Engine(source, device="cuda", dtype=dtype, max_sequences=8) as engine:
        cache = engine.model.cache
        with Loader(engine.device) as loader:
            pools = [
                load_experts(source, layer, engine.dtype, loader, DecodedCache(0))
                for layer in range(source.manifest.config.num_layers)
            ]
        reference = Decoder(
            source.manifest.config,
            engine.residency.weights,
            pools,
            engine.model.faces_VLE,
            cache,
        )
        rng = random.Random(0)
        names = ("v0", "v2", "v2")
        for name in set(names):
            assert engine.residency.admit(name)
        lengths, tables = (19, 1, 70), ([0, 1], [2, 3], [4, 5, 6, 7, 8])

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

        prompts = spans((0, 0, 0), lengths)
        batch = Batch.build(prompts, engine.device)
        expected_TH = reference.forward(batch)
        for one in (*cache.keys, *cache.values):
            one.fill_(torch.nan)
        assert error(engine.model.forward(batch), expected_TH) <= TOLERANCE[dtype]

        decodes = spans(lengths, (1, 1, 1))
        expected_TH = reference.forward(Batch.build(decodes, engine.device))
        groups = token_groups(span.slot for span in decodes)
        expected_TV = reference.logits(expected_TH, groups)
        assert engine.graphs is not None
        logits_TV, tokens_T = engine.graphs.run(decodes)
        assert error(logits_TV, expected_TV) <= TOLERANCE[dtype]
        assert tokens_T.tolist() == logits_TV.argmax(dim=-1).tolist()

"""Encoder-decoders on a GPU, where they run the same plain PyTorch, against the CPU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from moeconsolidate import consolidate
from moeruntime import Engine, Request, SamplingParams
from runtime_fixtures import relative_error
from switch_fixtures import write_switch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(scope="module", params=[1.0, 0.0], ids=["plain", "nested"])
def switch_pack(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    root = tmp_path_factory.mktemp("switch")
    folders = {
        name: write_switch(root / name, checkpoints["base"], seed=seed, expert_capacity=5)
        for seed, name in enumerate("abc")
    }
    return consolidate(folders, root / "pack", threshold=request.param).pack


@pytest.mark.parametrize("options", [{}, {"resident": 1, "kept_layers": 3}], ids=["all", "one"])
def test_a_gpu_says_what_a_cpu_says(switch_pack: Path, options: dict[str, int]) -> None:
    rng = random.Random(0)
    sources = [[rng.randrange(10, 4096) for _ in range(length)] for length in (1, 70, 33, 150)]
    targets = [[rng.randrange(10, 4096) for _ in range(length)] for length in (40, 1, 17, 90)]
    requests = [
        Request(name, source, SamplingParams(max_tokens=20)) for source in sources for name in "abc"
    ]
    with (
        Engine.from_pack(switch_pack, device="cpu", dtype="float32") as cpu,
        Engine.from_pack(switch_pack, device="cuda", dtype="float32", **options) as cuda,
    ):
        for name in "abc":
            both = zip(
                cuda.logprobs(name, targets, sources),
                cpu.logprobs(name, targets, sources),
                strict=True,
            )
            for found_TV, expected_TV in both:
                assert relative_error(found_TV, expected_TV) <= 1e-4
        found = [output.token_ids for output in cuda.generate(requests)]
        expected = [output.token_ids for output in cpu.generate(requests)]
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        assert same >= len(requests) - 1  # random weights come near a tie now and then


def test_bfloat16_runs(switch_pack: Path) -> None:
    with Engine.from_pack(switch_pack, device="cuda") as engine:
        outputs = engine.generate([Request(name, [5, 6, 7, 2]) for name in "abc"])
        assert all(output.token_ids for output in outputs)

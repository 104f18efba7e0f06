"""`moec bench` on CUDA: everything is measured, and memory is what was predicted."""

from __future__ import annotations

import json
import math

import pytest
import torch

from moeruntime.bench import BenchOptions, run_bench
from moeruntime.bench.ceilings import measure_ceilings
from moeruntime.synthetic import SYNTHETIC_MODELS, SyntheticSource

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("code", ["bf16", "4+2"])
@pytest.mark.parametrize("resident", [2, 3])
def test_every_part_is_measured(code: str, resident: int) -> None:
    source = SyntheticSource("mixtral-mini", num_variants=3, code=code)
    options = BenchOptions((1, 5, 8), context=64, prompt=128, device="cuda", resident=resident)
    report = run_bench(source, options)
    json.dumps(report.to_json())
    assert any(line.startswith("decode") for line in report.lines())
    assert report.ceilings.copy_bytes is not None and report.ceilings.copy_bytes > 1e9
    for part in report.memory:
        assert part.measured_bytes <= part.predicted_bytes, part.part
        # Nested experts may take float16 or not: the plan counts buffers for both.
        if code == "bf16" or part.part != "buffers of steps":
            assert part.measured_bytes == part.predicted_bytes, part.part
    assert {part.part for part in report.memory} >= {"experts", "buffers of steps"}
    assert "experts kept decoded" not in {part.part for part in report.memory}
    assert report.peak_bytes > sum(
        part.measured_bytes for part in report.memory if "host" not in part.part
    )
    assert [(row.variants, row.batch) for row in report.decode] == [
        (1, 1), (1, 5), (1, 8), (resident, 5), (resident, 8),
    ]  # fmt: skip
    config = SYNTHETIC_MODELS["mixtral-mini"]
    for row in report.decode:
        faces = config.num_experts * (1 if code == "bf16" else row.variants)
        assert config.top_k <= row.experts_per_layer <= min(faces, row.batch * config.top_k)
        assert row.engine_tokens_per_s is not None and row.engine_tokens_per_s > 0
        assert 0 < row.of_roofline < math.inf
    for one in report.ttft:
        assert one.after_another_s is not None
        assert (one.cold_s is None) == (one.copy_s is None) == (resident == 3)


def test_the_device_reads_faster_than_the_host_copies() -> None:
    best = measure_ceilings(torch.device("cuda", 0), torch.bfloat16)
    assert best.copy_bytes is not None
    assert best.read_bytes > 3 * best.copy_bytes
    assert best.gemm_flops > 1e13

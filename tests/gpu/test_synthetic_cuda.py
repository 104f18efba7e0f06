"""Random weights made on the device, in a second or so a gigabyte at worst."""

from __future__ import annotations

import time

import pytest
import torch

from moeruntime import Engine, Request, SamplingParams
from moeruntime.loader import Loader
from moeruntime.pack import MadeTensor
from moeruntime.synthetic import SyntheticSource

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("code", ["bf16", "4+2", "4+0"])
def test_an_engine_is_filled_on_the_device(code: str) -> None:
    source = SyntheticSource("mixtral-mini", num_variants=3, code=code)
    requests = [Request(f"v{idx}", [5, 6, 7], SamplingParams(max_tokens=6)) for idx in range(3)]
    answers = []
    for resident in (3, 1):
        with Engine(source, device="cuda", resident=resident) as engine:
            answers.append(engine.generate(requests))
            assert engine.dtype == torch.bfloat16
    assert answers[0] == answers[1]
    assert len({output.token_ids for output in answers[0]}) == 3


def test_full_size_tensors_are_made_fast_and_alike_in_both_kinds_of_memory() -> None:
    source = SyntheticSource("mixtral-8x7b", num_variants=1)
    stored = source.slot(0, "gate_up", 3)
    (tensor,) = stored
    assert isinstance(tensor, MadeTensor)
    on_device = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    with Loader(DEVICE) as loader:
        loader.load(stored, on_device)
        loader.load(stored, on_host)
    torch.cuda.synchronize()
    assert time.perf_counter() - start_s < 2.0, "0.2 GB twice"
    assert torch.equal(on_device.cpu(), on_host)
    assert float(on_device.float().std()) == pytest.approx(0.02, rel=0.01)

from __future__ import annotations

import gc

import pytest
import torch

from stress import make_requests, run_solo, run_together

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def requested_bytes() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def test_a_thousand_requests_answer_as_each_would_alone_and_leave_no_memory_behind() -> None:
    requests = make_requests(seed=4)
    run_together(requests[:20], "cuda", seed=1)  # what libraries keep, they take now
    before = requested_bytes()
    result = run_together(requests, "cuda", seed=5)
    assert requested_bytes() == before
    assert result.num_aborted > 50
    assert result.num_activations > 20
    assert result.num_reused_tokens > 1000
    solo = run_solo([requests[idx] for idx in result.outputs], "cuda")
    differing = [
        idx
        for (idx, output), alone in zip(result.outputs.items(), solo, strict=True)
        if output != alone
    ]
    # Products of other shapes round differently in the last bit, which may turn a tie.
    assert len(differing) <= len(solo) // 200, [requests[idx] for idx in differing]

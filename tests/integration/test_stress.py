from __future__ import annotations

from stress import make_requests, run_solo, run_together


def test_a_thousand_requests_answer_as_each_would_alone() -> None:
    requests = make_requests(seed=4)
    result = run_together(requests, "cpu", seed=5)
    assert result.num_aborted > 50
    assert result.num_activations > 20
    assert result.num_reused_tokens > 1000
    solo = run_solo([requests[idx] for idx in result.outputs], "cpu")
    for (idx, output), alone in zip(result.outputs.items(), solo, strict=True):
        assert output == alone, requests[idx]

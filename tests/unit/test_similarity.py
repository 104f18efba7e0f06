from __future__ import annotations

import pytest
import torch

from moeconsolidate.similarity import check_rows, cosine_similarity, linear_cka
from moeruntime.errors import CheckpointError


def describe(row: int) -> str:
    return f"row {row}"


def test_agrees_with_float64() -> None:
    torch.manual_seed(0)
    experts_EP = torch.randn(12, 70_001).bfloat16()
    experts_EP[5] = experts_EP[2] + 0.1 * experts_EP[5]
    unit_EP = torch.nn.functional.normalize(experts_EP.double(), dim=1)
    similarity_EE = cosine_similarity(experts_EP, describe=describe)
    assert similarity_EE.dtype == torch.float32
    torch.testing.assert_close(similarity_EE.double(), unit_EP @ unit_EP.T, rtol=0, atol=1e-7)
    assert torch.equal(similarity_EE, similarity_EE.T)
    assert torch.equal(similarity_EE.diagonal(), torch.ones(12))


def test_identical_and_opposite_rows_are_exact() -> None:
    torch.manual_seed(0)
    row_P = torch.randn(100_003).bfloat16()
    similarity_EE = cosine_similarity(torch.stack([row_P, -row_P, row_P]), describe=describe)
    assert similarity_EE.tolist() == [[1, -1, 1], [-1, 1, -1], [1, -1, 1]]


@pytest.mark.parametrize("num_columns", [1, 7, 16, 200_000])
def test_the_same_bits_for_any_number_of_threads(num_columns: int) -> None:
    torch.manual_seed(0)
    experts_EP = torch.randn(9, num_columns).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(cosine_similarity(experts_EP, describe=describe))
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_largest_and_smallest_weights_neither_overflow_nor_vanish() -> None:
    rows = torch.tensor([[3e38, 3e38], [1e-40, 1e-40], [1.0, 1.0]])
    for experts_EP in (rows, rows.bfloat16()):
        assert (cosine_similarity(experts_EP, describe=describe) > 0.999).all()


@pytest.mark.parametrize(
    ("value", "complaint"),
    [(float("nan"), "not finite"), (float("inf"), "not finite"), (0.0, "all weights are zero")],
)
@pytest.mark.parametrize("check", [cosine_similarity, check_rows])
def test_bad_rows_are_named(check: object, value: float, complaint: str) -> None:
    experts_EP = torch.ones(3, 50_000)
    if value == 0.0:
        experts_EP[1] = 0.0
    else:
        experts_EP[1, 49_999] = value
    with pytest.raises(CheckpointError, match=f"^row 1: .*{complaint}"):
        check(experts_EP, describe=describe)  # type: ignore[operator]


def reference_cka(x_NF: torch.Tensor, y_NF: torch.Tensor) -> float:
    """As its paper writes it, over features instead of samples."""
    x_NF, y_NF = (one.double() - one.double().mean(dim=0) for one in (x_NF, y_NF))
    both = (y_NF.T @ x_NF).square().sum()
    return float(both / ((x_NF.T @ x_NF).norm() * (y_NF.T @ y_NF).norm()))


def cka(samples: list[torch.Tensor]) -> torch.Tensor:
    return linear_cka(samples.__getitem__, len(samples), describe=describe, what="neuron")


def test_cka_is_that_of_its_paper() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(50, 30) + 3.0, torch.randn(50, 30)
    samples = [first, second, first + 0.3 * second, first[:, :7].contiguous()]
    similarity_EE = cka(samples)
    assert similarity_EE.dtype == torch.float32
    for row, one in enumerate(samples):
        for column, other in enumerate(samples):
            expected = reference_cka(one, other)
            assert float(similarity_EE[row, column]) == pytest.approx(expected, abs=1e-6)
    assert torch.equal(similarity_EE, similarity_EE.T)
    assert torch.equal(similarity_EE.diagonal(), torch.ones(4))


def test_cka_sees_neither_rotations_nor_scales_and_does_see_the_order_of_samples() -> None:
    torch.manual_seed(0)
    x_NF = torch.randn(40, 20)
    rotation, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    turned = 3 * (x_NF.double() @ rotation) + 5
    similarity_EE = cka([x_NF, turned, x_NF[torch.randperm(40)]])
    assert float(similarity_EE[0, 1]) == pytest.approx(1.0, abs=1e-6)
    assert float(similarity_EE[0, 2]) < 0.6


def test_cka_of_many_samples_looks_at_a_few_spread_evenly() -> None:
    torch.manual_seed(0)
    samples = [torch.randn(2000, 6), torch.randn(2000, 6)]
    spread = [one[::4] for one in samples]
    assert torch.equal(cka(samples), cka(spread))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(cka(samples), cka(spread))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("value", "complaint"), [(2.0, "are zero"), (float("inf"), "not finite")])
def test_cka_of_what_has_none_is_refused(value: float, complaint: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(CheckpointError, match=f"^row 1: .*neuron deviation.*{complaint}"):
        cka([torch.randn(9, 4), torch.full((9, 4), value)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_compare_as_they_do_in_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(1, 300_001, generator=generator)
    rows = (common + torch.randn(6, 300_001, generator=generator)).to(dtype)
    exact = rows.double() @ rows.double().T
    norms = exact.diagonal().sqrt()
    expected = (exact / norms / norms[:, None]).float()
    found = cosine_similarity(rows, describe=str)
    assert (found - expected).abs().max() <= 2**-23


@pytest.mark.parametrize("scale", [2.0**-70, 2.0**70])
def test_squares_that_float32_cannot_hold(scale: float) -> None:
    rows = torch.tensor([[3.0, 4.0], [4.0, 3.0], [1.0, 0.0]]).bfloat16()
    found = cosine_similarity(rows * scale, describe=str)
    assert torch.equal(found, cosine_similarity(rows.float(), describe=str))

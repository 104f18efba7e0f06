"""What an error costs, against sums over tokens written out.

Legend: E experts, N tokens (slots in `Importance`), R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeconsolidate import importance
from moeconsolidate.importance import (
    ExpertStatistics,
    Importance,
    SpooledLayers,
    Statistics,
    column_blocks,
)
from moeconsolidate.spool import Spool
from moeruntime.errors import ResourceError

ROWS, COLUMNS, TOKENS = 3, 5, 40


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counted(*experts: tuple[Tensor, Tensor]) -> ExpertStatistics:
    sums = ExpertStatistics.zeros(len(experts), ROWS, COLUMNS)
    for expert, (x_NC, gradient_NR) in enumerate(experts):
        for part in (slice(0, 7), slice(7, None)):  # tokens come in batches
            sums.add(expert, x_NC[part].float(), gradient_NR[part].float())
    return sums


def of_one_layer(sums: ExpertStatistics) -> Statistics:
    return Statistics(TOKENS, [{"down": sums}], torch.zeros(1, len(sums.outputs_ER)))


@pytest.fixture
def no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "FLOOR", 0.0)
    monkeypatch.setattr(importance, "DAMPING", 0.0)


def test_sums_are_of_each_tokens_outer_products() -> None:
    x_NC, gradient_NR = randn(TOKENS, COLUMNS, seed=0), randn(TOKENS, ROWS, seed=1)
    sums = counted((x_NC, gradient_NR), (x_NC[:0], gradient_NR[:0]))
    expected = torch.zeros(COLUMNS, COLUMNS, dtype=torch.float64)
    for x_C, d_R in zip(x_NC, gradient_NR, strict=True):
        weight_gradient_RC = torch.outer(d_R, x_C)
        expected += weight_gradient_RC.T @ weight_gradient_RC
    torch.testing.assert_close(sums.inputs_EKK[0][0].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        sums.outputs_ER[0].double(), gradient_NR.square().sum(dim=0), rtol=1e-5, atol=1e-5
    )
    assert not sums.inputs_EKK[0][1].any()
    assert not sums.outputs_ER[1].any()


def test_the_cost_is_a_quadratic_form() -> None:
    """1/2 g^T H g of the flattened error, with H = 2 diag(b) (x) A written out."""
    moment = randn(2, 3, COLUMNS, COLUMNS, seed=2)
    moment = moment @ moment.mT
    outputs = randn(2, 3, ROWS, seed=3).abs()
    error = randn(2, 3, ROWS, COLUMNS, seed=4)
    costs = Importance((moment,), outputs).cost(error)
    assert costs.shape == (2, 3)
    for n in range(2):
        for v in range(3):
            hessian = 2 * torch.kron(outputs[n, v].diag(), moment[n, v])
            flat = error[n, v].flatten()
            torch.testing.assert_close(costs[n, v], flat @ hessian @ flat / 2)


def test_blocks_leave_out_what_lies_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "DAMPING", 0.0)
    x_NC, gradient_NR = randn(TOKENS, COLUMNS, seed=5), randn(TOKENS, ROWS, seed=6)
    error = randn(1, 1, ROWS, COLUMNS, seed=7).float()
    dense = of_one_layer(counted((x_NC, gradient_NR))).importance(0, "down")
    monkeypatch.setattr(importance, "BLOCK_COLUMNS", 3)
    sums = counted((x_NC, gradient_NR))
    assert [tuple(block.shape) for block in sums.inputs_EKK] == [(1, 3, 3), (1, 2, 2)]
    blocked = of_one_layer(sums).importance(0, "down")
    left, right = error.clone(), error.clone()
    left[..., 3:], right[..., :3] = 0.0, 0.0
    for one in (left, right):  # an error within one block costs what it did
        torch.testing.assert_close(blocked.cost(one), dense.cost(one))
    torch.testing.assert_close(blocked.cost(error), dense.cost(left) + dense.cost(right))
    whole_CC = sums.whole_moment(0)
    assert whole_CC.shape == (COLUMNS, COLUMNS)
    assert not whole_CC[:3, 3:].any()


@pytest.mark.parametrize(
    ("num_columns", "widths"), [(1024, [1024]), (1025, [513, 512]), (1, [1]), (14336, [1024] * 14)]
)
def test_columns_are_cut_into_few_equal_blocks(num_columns: int, widths: list[int]) -> None:
    blocks = column_blocks(num_columns)
    assert [block.stop - block.start for block in blocks] == widths
    assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]]


def test_layers_come_back_from_disk_as_they_were_put() -> None:
    spool = Spool()
    sums = ExpertStatistics.zeros(2, ROWS, COLUMNS, watched=[1])
    for expert in (0, 1):
        sums.add(expert, randn(20, COLUMNS, seed=1).float(), randn(20, ROWS, seed=2).float())
    layers = SpooledLayers(spool, 2)
    layers.put(1, {"down": sums})
    found = layers[1]["down"]
    torch.testing.assert_close(found.inputs_EKK, sums.inputs_EKK, rtol=0, atol=0)
    assert torch.equal(found.outputs_ER, sums.outputs_ER)
    error = torch.ones(ROWS, COLUMNS)
    torch.testing.assert_close(
        found.sampled_losses(1, error), sums.sampled_losses(1, error), rtol=0, atol=0
    )
    assert len(layers) == 2
    assert [part.keys() for part in layers[1:]] == [{"down"}]
    with pytest.raises(IndexError):
        layers[2]


def test_a_spool_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = Spool()
    spool.put("one", torch.arange(3))
    assert spool.get("one").tolist() == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 1
    del spool
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ResourceError, match="temporary files"):
        Spool()


def test_rows_are_some_of_the_outputs() -> None:
    moment = torch.eye(COLUMNS).expand(1, 1, COLUMNS, COLUMNS)
    whole = Importance((moment,), torch.tensor([[[1.0, 2.0, 4.0]]]))
    error = torch.ones(1, 1, ROWS, COLUMNS)
    rows = torch.tensor([0, 2])
    assert float(whole.cost(error)) == 7 * COLUMNS
    assert float(whole.rows(rows).cost(error[:, :, rows])) == 5 * COLUMNS


@pytest.mark.usefixtures("no_floor")
def test_the_cost_is_the_second_order_loss_where_one_output_matters() -> None:
    """1/2 mean over tokens of (d . D x)^2: exact if every token's gradient is at one output."""
    x_NC = randn(TOKENS, COLUMNS, seed=5)
    gradient_NR = torch.zeros(TOKENS, ROWS, dtype=torch.float64)
    gradient_NR[:, 1] = randn(TOKENS, seed=6)
    error_RC = randn(ROWS, COLUMNS, seed=7)
    found = of_one_layer(counted((x_NC, gradient_NR))).importance(0, "down")
    expected = (gradient_NR * (x_NC @ error_RC.T)).sum(dim=1).square().mean() / 2
    cost = found.cost(error_RC.float()[None, None])
    torch.testing.assert_close(cost.double(), expected.view(1, 1), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("no_floor")
def test_the_cost_is_the_second_order_loss_of_independent_outputs_on_average() -> None:
    """Where the sizes of inputs and gradients do not hang together, as the factors assume."""
    num_tokens = 40_000
    x_NC = randn(num_tokens, COLUMNS, seed=8) * torch.arange(1, 1 + COLUMNS)
    gradient_NR = randn(num_tokens, ROWS, seed=9) * torch.tensor([1.0, 3.0, 0.1])
    error_RC = randn(ROWS, COLUMNS, seed=10)
    sums = counted((x_NC, gradient_NR))
    statistics = Statistics(num_tokens, [{"down": sums}], torch.zeros(1, 1))
    expected = (gradient_NR * (x_NC @ error_RC.T)).sum(dim=1).square().mean() / 2
    cost = statistics.importance(0, "down").cost(error_RC.float()[None, None])
    assert float(cost) == pytest.approx(float(expected), rel=0.1)


def test_experts_that_calibration_never_meets_still_cost_something() -> None:
    x_NC, gradient_NR = randn(TOKENS, COLUMNS, seed=0), randn(TOKENS, ROWS, seed=1)
    sums = counted((x_NC, gradient_NR), (x_NC[:0], gradient_NR[:0]))
    found = of_one_layer(sums).importance(0, "down")
    assert found.inputs_NVKK[0].shape == (2, 1, COLUMNS, COLUMNS)
    assert found.outputs_NVR.shape == (2, 1, ROWS)
    mean_CC = sums.inputs_EKK[0].mean(dim=0) / TOKENS
    floor_CC = importance.FLOOR * mean_CC
    damping = importance.DAMPING * floor_CC.diagonal().mean()
    torch.testing.assert_close(found.inputs_NVKK[0][1, 0], floor_CC + damping * torch.eye(COLUMNS))
    torch.testing.assert_close(found.outputs_NVR.sum(dim=-1), torch.full((2, 1), 0.5))
    assert bool((torch.linalg.eigvalsh(found.inputs_NVKK[0]) > 0).all())
    met, unmet = found.cost(randn(2, 1, ROWS, COLUMNS, seed=11).float()).flatten().tolist()
    assert 0 < unmet < met


def test_outputs_that_no_gradient_reaches_still_cost_something() -> None:
    x_NC, gradient_NR = randn(TOKENS, COLUMNS, seed=0), randn(TOKENS, ROWS, seed=1)
    gradient_NR[:, 2] = 0.0
    found = of_one_layer(counted((x_NC, gradient_NR))).importance(0, "down")
    outputs_R = found.outputs_NVR[0, 0]
    assert 0 < float(outputs_R[2]) < 0.02 * float(outputs_R[:2].mean())


def test_a_layer_that_no_gradient_reaches_can_still_be_coded() -> None:
    from moeconsolidate.encoding import encode
    from moeruntime.codes import NestedCode, PrivateCode

    nothing = (torch.zeros(0, COLUMNS), torch.zeros(0, ROWS))
    found = of_one_layer(counted(nothing, nothing)).importance(0, "down")
    assert bool(found.inputs_NVKK[0].isfinite().all())
    assert bool(found.outputs_NVR.isfinite().all())
    weights = randn(2, 1, ROWS, COLUMNS, seed=12).float()
    codes = encode(weights, NestedCode(4, 8), [[PrivateCode(3, 2)]] * 2, found)
    assert float((codes.weights_NVRC - weights).abs().max()) < 0.1

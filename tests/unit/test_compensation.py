"""Down matrices that make up for what has been lost before them.

Legend: W windows of T tokens, N tokens, H hidden, I intermediate.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import MakeCheckpoint
from moeconsolidate import compensation
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.compensation import Compensation
from moeconsolidate.parts import expert_parts
from moeconsolidate.streaming import PAD, ExpertWork, embed, streamed_block
from switch_fixtures import write_switch

GENERATOR = torch.Generator().manual_seed(1)
LEARNED, HELD_OUT, FRESH = (
    torch.randint(4096, (num_windows, 32), generator=GENERATOR) for num_windows in (48, 8, 8)
)
Experts = list[tuple[Tensor, Tensor]]


class Given:
    """A layer whose coded experts are what they are said to be, variant by variant."""

    def __init__(self, *variants: Experts) -> None:
        self._variants = variants

    def experts(self, variant: int) -> Experts:
        return self._variants[variant]

    def weights(self, variant: int, part: str) -> list[Tensor]:
        return [pair[("gate_up", "down").index(part)] for pair in self._variants[variant]]


def layer_of(checkpoint: Checkpoint, layer: int) -> Tensor:
    """A layer's experts as the compiler reads them, one row each."""
    config = checkpoint.config
    rows_EP = torch.empty(config.num_experts, config.expert_numel, dtype=checkpoint.expert_dtype)
    for expert, row_P in enumerate(rows_EP):
        checkpoint.read_expert(layer, expert, out=row_P)
    return rows_EP


def experts_of(checkpoint: Checkpoint, rows_EP: Tensor) -> Experts:
    return [expert_parts(row_P.float(), checkpoint.config) for row_P in rows_EP]


def noisy(experts: Experts, size: float) -> Experts:
    generator = torch.Generator().manual_seed(2)
    return [
        (gate_up, down + size * down.std() * torch.randn(down.shape, generator=generator))
        for gate_up, down in experts
    ]


def missed(checkpoint: Checkpoint, windows: Tensor, layers: list[Experts]) -> float:
    """How far the hidden states after some coded layers are from the original's, squared."""
    wanted = ours = embed(checkpoint, windows)
    for number, experts in enumerate(layers):
        wanted = streamed_block(checkpoint, number).run(wanted, windows)
        ours = streamed_block(checkpoint, number, experts=experts).run(ours, windows)
    return float((wanted - ours).square().mean())


@pytest.mark.parametrize(
    ("top_k", "caution", "most"), [(1, 1.0, 0.1), (2, 1.0, 0.5), (1, 0.5, 0.4), (2, 0.5, 0.7)]
)
def test_downs_make_up_for_what_earlier_layers_lost(
    make_checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    top_k: int,
    caution: float,
    most: float,
) -> None:
    """On windows that nothing was learned from: most of a loss that neurons can tell.

    As much as held-out text bears out leaves little of it; the half that is made leaves more.
    """
    monkeypatch.setattr(compensation, "CAUTION", caution)
    folder = make_checkpoint("tiny", seed=3, config={"num_experts_per_tok": top_k})
    with Checkpoint("tiny", folder) as checkpoint:
        first = experts_of(checkpoint, layer_of(checkpoint, 0))
        shrunk = [(gate_up, 0.5 * down) for gate_up, down in first]
        compensate = Compensation([checkpoint], [LEARNED], [HELD_OUT])
        rows_EP = layer_of(checkpoint, 0)
        for _, down in (expert_parts(row_P, checkpoint.config) for row_P in rows_EP):
            down.mul_(0.5)
        compensate.correct(0, rows_EP, Given(first))
        corrected = experts_of(checkpoint, rows_EP)
        left = missed(checkpoint, FRESH, [corrected]) / missed(checkpoint, FRESH, [shrunk])
        assert left < most


def test_what_a_layer_before_lost_is_made_up_for_by_the_next(
    make_checkpoint: MakeCheckpoint,
) -> None:
    folder = make_checkpoint("tiny", seed=3)
    with Checkpoint("tiny", folder) as checkpoint:
        first = noisy(experts_of(checkpoint, layer_of(checkpoint, 0)), 0.5)
        rows_EP = layer_of(checkpoint, 1)
        second = experts_of(checkpoint, rows_EP)
        compensate = Compensation([checkpoint], [LEARNED], [HELD_OUT])
        compensate.advance(0, Given(first))
        compensate.correct(1, rows_EP, Given(second))
        corrected = experts_of(checkpoint, rows_EP)
        before = missed(checkpoint, FRESH, [first, second])
        assert missed(checkpoint, FRESH, [first, corrected]) < 0.97 * before


def test_where_nothing_was_lost_nothing_changes(make_checkpoint: MakeCheckpoint) -> None:
    with Checkpoint("tiny", make_checkpoint("tiny", seed=3)) as checkpoint:
        compensate = Compensation([checkpoint] * 2, [LEARNED[:2]] * 2, [HELD_OUT[:2]] * 2)
        for layer in range(2):
            one_EP = layer_of(checkpoint, layer)
            rows_EP = torch.cat([one_EP, one_EP])
            experts = experts_of(checkpoint, one_EP)
            compensate.correct(layer, rows_EP, Given(experts, experts))
            assert torch.equal(rows_EP, torch.cat([one_EP, one_EP]))
            compensate.advance(layer, Given(experts, experts))


def test_each_variant_is_corrected_by_its_own_text(make_checkpoint: MakeCheckpoint) -> None:
    with Checkpoint("tiny", make_checkpoint("tiny", seed=3)) as checkpoint:
        one_EP = layer_of(checkpoint, 0)
        exact = experts_of(checkpoint, one_EP)
        rows_EP = torch.cat([one_EP, one_EP])
        broken = [(0.5 * gate_up, down) for gate_up, down in exact]
        compensate = Compensation([checkpoint] * 2, [LEARNED[:8]] * 2, [HELD_OUT] * 2)
        compensate.correct(0, rows_EP, Given(exact, broken))
        assert torch.equal(rows_EP[: len(one_EP)], one_EP)
        assert not torch.equal(rows_EP[len(one_EP) :], one_EP)


def test_corrections_that_do_not_hold_elsewhere_are_not_made() -> None:
    generator = torch.Generator().manual_seed(0)
    inner_NI, change_HI = (torch.randn(shape, generator=generator) for shape in ((50, 4), (3, 4)))
    tokens_N, weights_N = torch.arange(50), torch.full((50,), 0.5)
    nothing = torch.zeros(0)
    work = ExpertWork(0, tokens_N, weights_N, nothing, nothing, inner_NI, nothing)
    made_NH = 0.5 * inner_NI @ change_HI.T
    for times, part in ((1.0, 1.0), (0.3, 0.3), (-1.0, 0.0), (3.0, 1.0)):
        agreement = compensation._Agreement([change_HI])
        agreement.add(times * made_NH, [work])
        assert agreement.part == pytest.approx(part)
    assert compensation._Agreement([change_HI]).part == 0.0  # no held-out token at all


@pytest.mark.parametrize("num_columns", [6, 5], ids=["equal blocks", "a shorter one"])
def test_blocks_of_neurons_never_overshoot(
    num_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All neurons say the same, so each of three blocks could make the whole correction."""
    monkeypatch.setattr("moeconsolidate.importance.BLOCK_COLUMNS", 2)
    moments = compensation._Moments(1, 1, num_columns)
    signal_N = torch.randn(200, generator=torch.Generator().manual_seed(0))
    inner_NI = signal_N[:, None].expand(-1, num_columns)
    nothing = torch.zeros(0)
    work = ExpertWork(0, torch.arange(200), torch.ones(200), nothing, nothing, inner_NI, nothing)
    moments.add(signal_N[:, None], [work])
    (change_HI,) = moments.solve()
    assert 0.8 < float(change_HI.sum()) <= 1.0


def test_both_stacks_of_an_encoder_decoder_are_followed(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    folder = write_switch(tmp_path / "switch", checkpoints["base"], seed=0)
    windows_W2T = torch.randint(10, 4096, (6, 2, 9), generator=GENERATOR)
    windows_W2T[:, :, 6:] = PAD
    windows_W2T[3:, 1, 4:] = PAD
    with Checkpoint("switch", folder) as checkpoint:
        config = checkpoint.config
        compensate = Compensation([checkpoint], [windows_W2T[:4]], [windows_W2T[4:]])
        for layer in range(config.num_layers):
            rows_EP = layer_of(checkpoint, layer)
            experts = experts_of(checkpoint, rows_EP)
            halved = [(0.5 * gate_up, down) for gate_up, down in experts]
            compensate.correct(layer, rows_EP, Given(halved))
            changed = [
                not torch.equal(down, before)
                for (_, down), (_, before) in zip(
                    experts_of(checkpoint, rows_EP), experts, strict=True
                )
            ]
            assert any(changed), layer
            compensate.advance(layer, Given(experts))

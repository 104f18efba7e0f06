"""Neurons put into order: found exactly, and what an expert computes stays what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import TINY_CONFIG, MakeCheckpoint, random_tensors
from moeconsolidate import importance
from moeconsolidate.alignment import neuron_order, reorder_neurons, reorder_statistics
from moeconsolidate.calibration import collect
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.importance import ExpertStatistics, Statistics
from moeconsolidate.signals import expert_outputs
from moeruntime.families import ModelConfig

INNER = TINY_CONFIG["intermediate_size"]
WINDOWS = torch.randint(4096, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def config(make_checkpoint: MakeCheckpoint) -> ModelConfig:
    with Checkpoint("any", make_checkpoint("any")) as checkpoint:
        return checkpoint.config


def shuffled(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """An expert, the same with its neurons in another order and a little changed, and the order."""
    generator = torch.Generator().manual_seed(2)
    expert_P = torch.randn(config.expert_numel, generator=generator)
    order_I = torch.randperm(INNER, generator=generator)
    other_P = expert_P.clone()
    reorder_neurons(other_P, order_I, config)
    return expert_P, other_P + 0.1 * torch.randn(other_P.shape, generator=generator), order_I


def test_a_shuffle_is_found_and_undone(config: ModelConfig) -> None:
    expert_P, other_P, order_I = shuffled(config)
    found_I = neuron_order(other_P, expert_P, config)
    assert torch.equal(order_I[found_I], torch.arange(INNER))
    assert float((other_P - expert_P).norm() / expert_P.norm()) > 1
    reorder_neurons(other_P, found_I, config)
    assert float((other_P - expert_P).norm() / expert_P.norm()) < 0.11


def test_the_order_has_the_largest_inner_product(config: ModelConfig) -> None:
    """Of two unrelated experts: no swap of two neurons makes it larger."""
    generator = torch.Generator().manual_seed(3)
    first_P, second_P = torch.randn(2, config.expert_numel, generator=generator)

    def product(order_I: Tensor) -> float:
        moved_P = second_P.clone()
        reorder_neurons(moved_P, order_I, config)
        return float(moved_P.double() @ first_P.double())

    found_I = neuron_order(second_P, first_P, config)
    best = product(found_I)
    assert best > product(torch.arange(INNER))
    for one in range(INNER):
        for other in range(one):
            swapped_I = found_I.clone()
            swapped_I[[one, other]] = found_I[[other, one]]
            assert product(swapped_I) < best


def test_an_expert_computes_the_same_in_any_order(config: ModelConfig) -> None:
    expert_P, _, order_I = shuffled(config)
    moved_P = expert_P.clone()
    reorder_neurons(moved_P, order_I, config)
    assert not torch.equal(moved_P, expert_P)
    inputs_NH = torch.randn(7, config.hidden_size)
    both = expert_outputs(torch.stack([expert_P, moved_P]), inputs_NH, config)
    torch.testing.assert_close(both[0], both[1], rtol=1e-4, atol=1e-4)


def test_calibration_is_that_of_the_reordered_expert(make_checkpoint: MakeCheckpoint) -> None:
    order_I = torch.randperm(INNER, generator=torch.Generator().manual_seed(5))
    tensors = random_tensors(TINY_CONFIG, seed=4)

    def edit(tensors: dict[str, Any]) -> None:
        for expert in (0, 2):
            start = f"model.layers.1.block_sparse_moe.experts.{expert}."
            for name in ("w1", "w3"):
                tensors[f"{start}{name}.weight"] = tensors[f"{start}{name}.weight"][order_I]
            tensors[start + "w2.weight"] = tensors[start + "w2.weight"][:, order_I]

    before = statistics_of(make_checkpoint("before", tensors=tensors))
    expected = statistics_of(make_checkpoint("after", tensors=tensors, edit=edit))
    untouched = [one.clone() for one in before.layers[1]["down"].inputs_EKK]
    found = reorder_statistics(before, 1, {0: order_I, 2: order_I})
    for now, then in zip(before.layers[1]["down"].inputs_EKK, untouched, strict=True):
        assert torch.equal(now, then)
    assert sum(len(part.samples) for one in found.layers for part in one.values()) == 4
    for layer in range(2):
        for part in ("gate_up", "down"):
            ours, theirs = found.layers[layer][part], expected.layers[layer][part]
            for moments_EKK, expected_EKK in zip(ours.inputs_EKK, theirs.inputs_EKK, strict=True):
                compare(moments_EKK, expected_EKK)
            compare(ours.outputs_ER, theirs.outputs_ER)
            assert set(ours.samples) == set(theirs.samples)
            for expert, samples in ours.samples.items():
                for one, other in zip(samples, theirs.samples[expert], strict=True):
                    compare(one[0], other[0])
                    compare(one[1], other[1])


def test_blocks_of_second_moments_hold_what_lay_in_one_block_before_and_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importance, "BLOCK_COLUMNS", 3)
    x_NC, d_NR = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(6))
    down = ExpertStatistics.zeros(1, 6, 6)
    down.add(0, x_NC, d_NR)
    gate_up = ExpertStatistics.zeros(1, 12, 6)
    before = Statistics(9, [{"gate_up": gate_up, "down": down}], torch.tensor([[9]]))
    order_I = torch.tensor([1, 0, 3, 2, 5, 4])
    after = reorder_statistics(before, 0, {0: order_I}).layers[0]["down"]
    expected_II = down.whole_moment(0)[order_I][:, order_I]
    expected_II[:3, 3:] = expected_II[3:, :3] = 0
    assert torch.equal(after.whole_moment(0), expected_II)
    assert int((expected_II == 0).sum()) == 18 + 8  # between blocks, and where they were crossed


def statistics_of(folder: Path) -> Statistics:
    with Checkpoint("tiny", folder) as checkpoint:
        return collect(checkpoint, WINDOWS)


def compare(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())

"""What experts are compared by, against transformers and against sums written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import TINY_CONFIG, MakeCheckpoint
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.signals import (
    NUM_INPUTS,
    NUM_WINDOWS,
    expert_inputs,
    expert_outputs,
    neurons,
    num_inputs,
)
from runtime_fixtures import load_reference

HIDDEN, INNER = TINY_CONFIG["hidden_size"], TINY_CONFIG["intermediate_size"]


@pytest.fixture
def folder(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("tiny", seed=3)


@pytest.mark.parametrize("num_variants", [1, 2, 3, 7, 600])
def test_variants_give_equally_many_inputs(num_variants: int) -> None:
    counts = [num_inputs(idx, num_variants) for idx in range(num_variants)]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == max(NUM_INPUTS, num_variants)


def test_inputs_are_what_transformers_hands_its_experts(folder: Path) -> None:
    windows_WT = torch.randint(4096, (3, 11), generator=torch.Generator().manual_seed(1))
    model = load_reference(folder)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model(windows_WT)
    done: list[int] = []
    with Checkpoint("tiny", folder) as checkpoint:
        inputs_LNH = expert_inputs(checkpoint, windows_WT, 11, on_block=done.append)
    assert inputs_LNH.shape == (2, 11, HIDDEN)
    for found_NH, all_WTH in zip(inputs_LNH, seen, strict=True):
        # The middle token of every three.
        torch.testing.assert_close(found_NH, all_WTH.flatten(0, 1)[1::3], rtol=1e-4, atol=1e-5)
    assert done == [0, 1]


def test_inputs_come_from_all_over_a_long_text(folder: Path) -> None:
    windows_WT = torch.randint(4096, (4 * NUM_WINDOWS, 8))
    with Checkpoint("tiny", folder) as checkpoint:
        inputs_LNH = expert_inputs(checkpoint, windows_WT, 20)
        assert torch.equal(inputs_LNH, expert_inputs(checkpoint, windows_WT[2::4], 20))
        few_LNH = expert_inputs(checkpoint, windows_WT[:1, :2], 6)
    assert few_LNH.shape == (2, 6, HIDDEN)
    assert few_LNH[0].unique(dim=0).shape[0] == 2


def test_outputs_are_those_of_every_expert_for_every_input(folder: Path) -> None:
    with Checkpoint("tiny", folder) as checkpoint:
        config = checkpoint.config
        experts_EP = torch.empty(4, config.expert_numel, dtype=torch.bfloat16)
        for expert in range(4):
            checkpoint.read_expert(1, expert, out=experts_EP[expert])
    inputs_NH = torch.randn(5, HIDDEN)
    outputs_ENH = expert_outputs(experts_EP, inputs_NH, config)
    for row_P, found_NH in zip(experts_EP.double(), outputs_ENH, strict=True):
        gate, up, down = row_P.split(INNER * HIDDEN)
        for x_H, found_H in zip(inputs_NH.double(), found_NH, strict=True):
            inner_I = F.silu(gate.view(INNER, HIDDEN) @ x_H) * (up.view(INNER, HIDDEN) @ x_H)
            expected_H = down.view(HIDDEN, INNER) @ inner_I
            torch.testing.assert_close(found_H.double(), expected_H, rtol=1e-4, atol=1e-6)


def test_a_neuron_is_two_rows_and_a_column(folder: Path) -> None:
    with Checkpoint("tiny", folder) as checkpoint:
        row_P = torch.arange(checkpoint.config.expert_numel, dtype=torch.float32)
        neurons_IF = neurons(row_P, checkpoint.config)
    gate, up, down = row_P.split(INNER * HIDDEN)
    assert neurons_IF.shape == (INNER, 3 * HIDDEN)
    expected = [
        gate.view(INNER, HIDDEN)[5],
        up.view(INNER, HIDDEN)[5],
        down.view(HIDDEN, INNER)[:, 5],
    ]
    assert torch.equal(neurons_IF[5], torch.cat(expected))

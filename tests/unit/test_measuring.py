"""Measured losses and what planning makes of them."""

from __future__ import annotations

import pytest
import torch

from helpers import TINY_CONFIG, MakeCheckpoint, random_tensors
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.measuring import MeasuredLoss, _compare, trimmed_mean
from moeconsolidate.planning import _ratios


def test_a_divergence_far_below_float32_is_seen(make_checkpoint: MakeCheckpoint) -> None:
    """It falls with the square of what the outputs differ by, and is never negative."""
    folder = make_checkpoint(
        "base", config=TINY_CONFIG, tensors=random_tensors(TINY_CONFIG, seed=0)
    )
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, TINY_CONFIG["vocab_size"], (2, 16), generator=generator)
    before = torch.randn(2, 16, TINY_CONFIG["hidden_size"], generator=generator)
    change = torch.randn(before.shape, generator=generator)
    with Checkpoint("base", folder) as checkpoint:
        large, small, none = (
            _compare(checkpoint, windows, before, before + size * change).kl
            for size in (1e-2, 1e-4, 0.0)
        )
    assert large > 0
    assert small == pytest.approx(large / 10_000, rel=0.2)
    assert none == 0


def test_what_cannot_be_seen_is_not_corrected() -> None:
    nothing = MeasuredLoss(nll_increase=1e-9, standard_error=1e-6, kl=0.0)
    assert _ratios([nothing, nothing], [1e-12, 1e-11]) == [1.0, 1.0]


def test_a_trimmed_mean_leaves_out_the_ends() -> None:
    values_W = torch.tensor([3.0, 100.0, 1.0, 2.0, 4.0, -50.0, 5.0, 6.0])
    assert trimmed_mean(values_W) == pytest.approx((3 + 1 + 2 + 4 + 5 + 6) / 6)
    assert trimmed_mean(values_W[:7]) == pytest.approx(float(values_W[:7].mean()))  # too few
    assert trimmed_mean(torch.tensor([7.0])) == 7.0

"""What an allocation really costs each variant, measured before anything is written.

Predictions rank options well but miss what errors of many layers add up to, more for one variant
than for another. So held-out text runs through the original and through the coded experts, side by
side and a block at a time, and the loss is read off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.coding import decode_layer
from moeconsolidate.importance import Statistics
from moeconsolidate.layers import LayerReader
from moeconsolidate.plan import LayerPlan
from moeconsolidate.streaming import embed, output_logits, predictions, streamed_block
from moeconsolidate.threads import side_by_side
from moeruntime.codes import NestedCode

__all__ = ["MeasuredLoss", "measure", "trimmed_mean"]

TRIMMED = 0.125
"""Of windows in order of what they say, the part that is left out at either end: a few hard ones
would decide the mean of the rest."""


@dataclass(frozen=True, slots=True)
class MeasuredLoss:
    """Of one variant, on held-out text, nats per token.

    Attributes:
        nll_increase: increase of the negative log-likelihood, `trimmed_mean` of windows.
        standard_error: of the plain mean, from how windows differ.
        kl: KL divergence of the coded model's predictions from the original's, likewise trimmed.
    """

    nll_increase: float
    standard_error: float
    kl: float


def measure(
    checkpoints: Sequence[Checkpoint],
    layers: Sequence[LayerPlan],
    reader: LayerReader,
    nested: Mapping[str, NestedCode],
    statistics: Sequence[Statistics],
    windows: Sequence[Tensor],
) -> list[MeasuredLoss]:
    """Run each variant's windows through its original and its coded experts.

    Codes are chosen without sweeps here, which is several times faster and a little worse.

    Args:
        checkpoints: the variants.
        layers: slots and private codes of every layer.
        reader: where layers are read from.
        nested: how shared codes are stored.
        statistics: each variant's calibration.
        windows: each variant's held-out text, as `streaming` has it.
    """
    originals = [embed(*one) for one in zip(checkpoints, windows, strict=True)]
    coded = list(originals)
    config = checkpoints[0].config
    coming = iter(layers)
    for number, block in enumerate(config.blocks):
        decoded: Sequence[Sequence[tuple[Tensor, Tensor]] | None] = [None] * len(checkpoints)
        if block in config.layers:
            plan = next(coming)
            reader.read(plan.layer, plan)
            aligned = reader.aligned(statistics)
            decoded = decode_layer(plan, reader.experts_EP, config, nested, aligned)
        both = side_by_side(
            lambda one: _run_block(*one),
            zip(checkpoints, repeat(number), decoded, windows, originals, coded, strict=False),
        )
        originals, coded = [one for one, _ in both], [one for _, one in both]
    return side_by_side(
        lambda one: _compare(*one), zip(checkpoints, windows, originals, coded, strict=True)
    )


def _run_block(
    checkpoint: Checkpoint,
    number: int,
    experts: Sequence[tuple[Tensor, Tensor]] | None,
    windows: Tensor,
    before: Tensor,
    after: Tensor,
) -> tuple[Tensor, Tensor]:
    """One variant's block, original and coded, each on its own input."""
    original = streamed_block(checkpoint, number).run(before, windows)
    return original, streamed_block(checkpoint, number, experts=experts).run(after, windows)


@torch.no_grad()
def _compare(
    checkpoint: Checkpoint, windows: Tensor, befores: Tensor, afters: Tensor
) -> MeasuredLoss:
    """What one variant loses, from the last block's outputs, original and coded."""
    increases, divergences = [], []
    to_logits = output_logits(checkpoint)
    for window, before, after in zip(windows, befores, afters, strict=True):
        before_TH, targets_N = predictions(before, window)
        after_TH, _ = predictions(after, window)
        # In float64: a divergence is a small difference of large terms, and never below zero.
        before_TV = to_logits(before_TH).double().log_softmax(dim=-1)
        after_TV = to_logits(after_TH).double().log_softmax(dim=-1)
        rows = torch.arange(len(targets_N)), targets_N
        gained = before_TV[rows] - after_TV[rows]
        increases.append(gained.mean())
        divergences.append((before_TV.exp() * (before_TV - after_TV)).sum(dim=-1).mean())
    increase_W, kl_W = torch.stack(increases), torch.stack(divergences)
    error = increase_W.std(correction=1) / len(increase_W) ** 0.5 if len(increase_W) > 1 else 1.0
    return MeasuredLoss(trimmed_mean(increase_W), float(error), max(trimmed_mean(kl_W), 0.0))


def trimmed_mean(values_W: Tensor) -> float:
    """Mean of those in the middle, without an eighth (rounded down) at either end."""
    at_an_end = int(len(values_W) * TRIMMED)
    return float(values_W.sort().values[at_an_end : len(values_W) - at_an_end].mean())

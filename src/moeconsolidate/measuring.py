"""What an allocation really costs each variant, measured before anything is written.

Predictions rank options well but miss what errors of many layers add up to, more for one variant
than for another. So held-out text runs through the original and through the coded experts, side by
side and a layer at a time, and the loss is read off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from moeconsolidate.calibration import StreamedLayer, output_logits
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.coding import decode_layer
from moeconsolidate.importance import Statistics
from moeconsolidate.layers import LayerReader
from moeconsolidate.plan import LayerPlan
from moeconsolidate.threads import side_by_side
from moeruntime.codes import NestedCode

__all__ = ["MeasuredLoss", "measure"]


@dataclass(frozen=True, slots=True)
class MeasuredLoss:
    """Of one variant, on held-out text, nats per token.

    Attributes:
        nll_increase: mean increase of the negative log-likelihood.
        standard_error: of that mean, from how windows differ.
        kl: mean KL divergence of the coded model's predictions from the original's.
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
        windows: each variant's held-out text, int64 [W, T].
    """
    originals = [
        checkpoint.read_non_expert("embed_tokens").float()[windows_WT]
        for checkpoint, windows_WT in zip(checkpoints, windows, strict=True)
    ]
    coded = list(originals)
    config = checkpoints[0].config
    for plan in layers:
        reader.read(plan.layer, plan)
        decoded = decode_layer(plan, reader.experts_EP, config, nested, reader.aligned(statistics))
        both = side_by_side(
            lambda one: _run_layer(*one),
            zip(checkpoints, repeat(plan.layer), decoded, originals, coded, strict=False),
        )
        originals, coded = [one for one, _ in both], [one for _, one in both]
    return side_by_side(
        lambda one: _compare(*one), zip(checkpoints, windows, originals, coded, strict=True)
    )


def _run_layer(
    checkpoint: Checkpoint,
    layer: int,
    experts: Sequence[tuple[Tensor, Tensor]],
    before_WTH: Tensor,
    after_WTH: Tensor,
) -> tuple[Tensor, Tensor]:
    """One variant's layer, original and coded, each on its own input."""
    original = StreamedLayer(checkpoint, layer).run(before_WTH)
    return original, StreamedLayer(checkpoint, layer, experts=experts).run(after_WTH)


@torch.no_grad()
def _compare(
    checkpoint: Checkpoint, windows_WT: Tensor, before_WTH: Tensor, after_WTH: Tensor
) -> MeasuredLoss:
    """Compare predictions window by window."""
    increases, divergences = [], []
    to_logits = output_logits(checkpoint)
    for window_T, before_TH, after_TH in zip(windows_WT, before_WTH, after_WTH, strict=True):
        before_TV = to_logits(before_TH).log_softmax(dim=-1)
        after_TV = to_logits(after_TH).log_softmax(dim=-1)
        targets_T1 = window_T[1:, None]
        gained = before_TV[:-1].gather(1, targets_T1) - after_TV[:-1].gather(1, targets_T1)
        increases.append(gained.mean())
        divergences.append((before_TV.exp() * (before_TV - after_TV)).sum(dim=-1).mean())
    increase_W = torch.stack(increases).double()
    error = increase_W.std(correction=1) / len(increase_W) ** 0.5 if len(increase_W) > 1 else 1.0
    return MeasuredLoss(
        float(increase_W.mean()), float(error), float(torch.stack(divergences).mean())
    )

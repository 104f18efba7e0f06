"""From logits to tokens: greedy, or by temperature, top-k and top-p.

Every sequence brings its own random numbers, so what it samples depends on its seed alone and not
on who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeruntime.request import SamplingParams

__all__ = ["resample", "sample"]


@torch.inference_mode()
def sample(
    logits_NV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    """Choose one token a row.

    Args:
        logits_NV: float32.
        params: one a row.
        uniforms: one number in [0, 1) a row; ignored by greedy rows.

    Returns:
        N token ids.
    """
    tokens_N = logits_NV.argmax(dim=-1)
    resample(tokens_N, logits_NV, params, uniforms)
    return [int(token) for token in tokens_N.tolist()]


@torch.inference_mode()
def resample(
    tokens_N: Tensor, logits_NV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> None:
    """Replace the likeliest tokens, in place, by sampled ones where the temperature is above 0.

    Nothing waits for the device.
    """
    rows = [row for row, one in enumerate(params) if one.temperature > 0]
    if not rows:
        return
    rows_S = torch.tensor(rows)
    if logits_NV.is_cuda:
        rows_S = rows_S.pin_memory().to(logits_NV.device, non_blocking=True)
    tokens_N[rows_S] = _sample_rows(
        logits_NV[rows_S], [params[row] for row in rows], [uniforms[row] for row in rows]
    )


def _sample_rows(
    logits_NV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> Tensor:
    """Invert each row's cumulative distribution over the tokens that top-k and top-p leave."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_NV.device)[:, None]

    # float64: a cumulative sum over 100,000 tokens in float32 can miss the last ones.
    temperature = column([one.temperature for one in params])
    # The maximum goes first, so that a tiny temperature underflows instead of overflowing.
    centred_NV = logits_NV.double() - logits_NV.double().amax(dim=-1, keepdim=True)
    probs, ids = (centred_NV / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probs.cumsum(dim=-1) - probs
    rank = torch.arange(probs.shape[1], device=probs.device)[None, :]
    top_k = column([one.top_k or probs.shape[1] for one in params])
    keep = (before < column([one.top_p for one in params])) & (rank < top_k)
    keep[:, 0] = True
    cumulative = torch.where(keep, probs, 0.0).cumsum(dim=-1)
    target = column(list(uniforms)) * cumulative[:, -1:]
    position = torch.searchsorted(cumulative, target, right=True)
    position = position.clamp(max=keep.sum(dim=-1, keepdim=True) - 1)
    return ids.gather(1, position)[:, 0]

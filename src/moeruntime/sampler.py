"""From logits to tokens: greedy, or by temperature, top-k and top-p.

Every sequence brings its own random numbers, so what it samples depends on its seed alone and not
on who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeruntime.kernels.spans import to_device
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
    rows_S = to_device(torch.tensor(rows), logits_NV.device)
    tokens_N[rows_S] = _sample_rows(
        logits_NV[rows_S], [params[row] for row in rows], [uniforms[row] for row in rows]
    )


def _sample_rows(
    logits_NV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> Tensor:
    """Invert each row's cumulative distribution over the tokens that top-k and top-p leave."""
    vocab_size = logits_NV.shape[1]
    # float64: a cumulative sum over 100,000 tokens in float32 can miss the last ones.
    wanted = torch.tensor(
        [
            [one.temperature for one in params],
            [one.top_k or vocab_size for one in params],
            [one.top_p for one in params],
            uniforms,
        ],
        dtype=torch.float64,
    )
    temperature, top_k, top_p, uniform = to_device(wanted, logits_NV.device)[..., None].unbind()
    # The maximum goes first, so that a tiny temperature underflows instead of overflowing.
    centred_NV = logits_NV.double() - logits_NV.double().amax(dim=-1, keepdim=True)
    probs, ids = (centred_NV / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probs.cumsum(dim=-1) - probs
    rank = torch.arange(vocab_size, device=probs.device)[None, :]
    keep = (before < top_p) & (rank < top_k)
    keep[:, 0] = True
    cumulative = torch.where(keep, probs, 0.0).cumsum(dim=-1)
    target = uniform * cumulative[:, -1:]
    position = torch.searchsorted(cumulative, target, right=True)
    position = position.clamp(max=keep.sum(dim=-1, keepdim=True) - 1)
    return ids.gather(1, position)[:, 0]

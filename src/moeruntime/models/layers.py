"""Normalisation and positions, rotary or relative, for a step of mixed variants.

Legend: T tokens, R resident slots, H hidden, N heads, D head dimension; Q queries, K keys, B
buckets of distances.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeruntime.families import DecoderConfig

__all__ = [
    "apply_rotary",
    "half_rotary_tables",
    "relative_bias",
    "rms_norm",
    "rotary_bytes",
    "rotary_tables",
]


def rms_norm(x_TH: Tensor, weight_RH: Tensor, slot_T: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019) with each token's own variant's weight."""
    x32 = x_TH.float()
    normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    return weight_RH[slot_T] * normed.to(x_TH.dtype)


def rotary_tables(
    positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, D] of the rotary embedding (Su et al. 2021), computed in float32."""
    device = positions_T.device
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angles = positions_T.float()[:, None] * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def half_rotary_tables(config: DecoderConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Float32 cosines and sines [positions, D / 2] of the whole context."""
    positions = torch.arange(config.max_context, device=device)
    cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, torch.float32)
    half = config.head_dim // 2
    return cos[:, 0, :half].contiguous(), sin[:, 0, :half].contiguous()


def rotary_bytes(config: DecoderConfig) -> int:
    """Of both of `half_rotary_tables`."""
    return 2 * 4 * config.max_context * (config.head_dim // 2)


def apply_rotary(x_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head's pairs (first half, second half) by the token's angles."""
    first, second = x_TND.chunk(2, dim=-1)
    return x_TND * cos + torch.cat((-second, first), dim=-1) * sin


def relative_bias(
    bias_BN: Tensor, queries: range, num_keys: int, *, causal: bool, max_distance: int
) -> Tensor:
    """What a relative position bias adds to attention scores (Raffel et al. 2020, T5).

    Near distances have a bucket each, far ones share buckets that grow with the logarithm of the
    distance; both directions have half of the buckets each unless only the past may be seen.

    Args:
        bias_BN: each bucket's bias for each head.
        queries: positions of the queries.
        num_keys: keys are at 0 to num_keys - 1.
        causal: a query sees no later keys: their bias is minus infinity.
        max_distance: all distances from here on share the last bucket.

    Returns:
        [N, Q, K] in the dtype of bias_BN.
    """
    device = bias_BN.device
    query_Q = torch.arange(queries.start, queries.stop, device=device)
    ahead_QK = torch.arange(num_keys, device=device) - query_Q[:, None]
    num_buckets = len(bias_BN) if causal else len(bias_BN) // 2
    distance_QK = ahead_QK.neg().clamp(min=0) if causal else ahead_QK.abs()
    near = num_buckets // 2
    growth = (distance_QK.float() / near).log() / math.log(max_distance / near)
    far_QK = near + (growth.clamp(min=0) * (num_buckets - near)).long()
    bucket_QK = torch.where(distance_QK < near, distance_QK, far_QK.clamp(max=num_buckets - 1))
    if not causal:
        bucket_QK += num_buckets * (ahead_QK > 0)
    bias_NQK = bias_BN[bucket_QK].permute(2, 0, 1)
    return bias_NQK.masked_fill(ahead_QK > 0, -torch.inf) if causal else bias_NQK

"""Normalisation and positions, rotary or relative, for a step of mixed variants.

Legend: T tokens, R resident slots, H hidden, N heads, D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeruntime.families import DecoderConfig

__all__ = [
    "apply_rotary",
    "half_rotary_tables",
    "relative_buckets",
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


def relative_buckets(ahead: Tensor, num_buckets: int, *, causal: bool, max_distance: int) -> Tensor:
    """The bucket of a relative position, whose bias is added to a score (Raffel et al. 2020, T5).

    Near distances have a bucket each, far ones share buckets that grow with the logarithm of the
    distance; both directions have half of the buckets each unless only the past is seen.

    Args:
        ahead: int64; how far a key lies ahead of a query, negative behind it.
        num_buckets: in all.
        causal: only the past is seen; keys ahead get the bucket of distance 0.
        max_distance: all distances from here on share the last bucket.

    Returns:
        int64 in the shape of `ahead`.
    """
    distance = ahead.neg().clamp(min=0) if causal else ahead.abs()
    num_each = num_buckets if causal else num_buckets // 2
    near = num_each // 2
    growth = (distance.float() / near).log() / math.log(max_distance / near)
    far = near + (growth.clamp(min=0) * (num_each - near)).long()
    bucket = torch.where(distance < near, distance, far.clamp(max=num_each - 1))
    return bucket if causal else bucket + num_each * (ahead > 0)

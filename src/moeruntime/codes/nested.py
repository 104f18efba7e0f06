"""Nested codes: high bits that variants share, low bits of each variant's own, one scale for both.

A matrix [R, C] that several variants share is stored once as integers H of h bits and one bfloat16
scale u for each run of g columns of a row. A variant refines it with integers L of r bits and a
step a, one small integer for the whole matrix:

    q = (H << (7 - h)) + a * L
    w = u * (q - ((2**h - 1) * 2**(7 - h) + a * (2**r - 1)) / 2)

With r = 0 a variant takes the shared matrix as it is. q stays below 256, so it is exact in bfloat16
and fits a byte; a kernel forms it with one multiply-add of integers, and takes the constant out
through the sum of its inputs. Averages of variants need few bits, and what sets a fine-tune apart
is small beside a step of H, so a few private bits reach far (Any-Precision's nesting, with variants
in the place of widths).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeruntime.codes.planes import plane_bytes, unpack_planes

__all__ = ["NestedCode", "PrivateCode", "decode", "nested_bytes", "scale_columns"]

LEVEL_BITS = 7
"""H is scaled to this many bits, so that private steps are integers."""


@dataclass(frozen=True, slots=True, order=True)
class PrivateCode:
    """How one variant refines a matrix: `bits` r, 0 to 4, and integer `step` a, 0 if r = 0."""

    bits: int
    step: int

    def valid(self) -> bool:
        """Whether the pair can be stored: steps stay below one of H's and fit the byte of q."""
        if self.bits == 0:
            return self.step == 0
        return 1 <= self.bits <= 4 and 1 <= self.step * (2**self.bits - 1) <= 127


@dataclass(frozen=True, slots=True)
class NestedCode:
    """How a slot's matrix is stored: `shared_bits` h of 2 to 6, and `group` g columns a scale."""

    shared_bits: int
    group: int


def scale_columns(num_columns: int, group: int) -> int:
    """Scales of a row; the last one may cover fewer columns."""
    return -(-num_columns // group)


def nested_bytes(
    num_rows: int, num_columns: int, code: NestedCode, private: Sequence[PrivateCode]
) -> int:
    """Bytes of a matrix with all its variants: codes, scales, and a byte a variant for its code."""
    bits = (code.shared_bits, *(one.bits for one in private))
    scales = 2 * num_rows * scale_columns(num_columns, code.group)
    codes = sum(plane_bytes(num_rows, num_columns, one) for one in bits)
    return codes + scales + 1 + len(private)


def decode(
    shared_RC: Tensor,
    scale_RG: Tensor,
    code: NestedCode,
    private_RC: Tensor | None,
    private: PrivateCode,
) -> Tensor:
    """Turn codes back into weights.

    Args:
        shared_RC: integers H.
        scale_RG: bfloat16 u.
        code: h and g.
        private_RC: integers L, None where r = 0.
        private: r and a.

    Returns:
        float32 [R, C]; exact, since a bfloat16 times a half-integer below 256 fits.
    """
    shift = LEVEL_BITS - code.shared_bits
    level = shared_RC.to(torch.int32) << shift
    twice_offset = (2**code.shared_bits - 1) << shift
    if private_RC is not None:
        level = level + private.step * private_RC.to(torch.int32)
        twice_offset += private.step * (2**private.bits - 1)
    scale_RC = scale_RG.float().repeat_interleave(code.group, dim=1)[:, : shared_RC.shape[1]]
    weights_RC: Tensor = (level.float() - twice_offset / 2) * scale_RC
    return weights_RC


def decode_planes(
    shared: Mapping[int, Tensor],
    own: Mapping[int, Tensor],
    num_columns: int,
    scale_RG: Tensor,
    code: NestedCode,
    private: PrivateCode,
) -> Tensor:
    """`decode` of codes as they are stored.

    Args:
        shared: planes of the integers H, by width.
        own: planes of the integers L; none where r = 0.
        num_columns: of the matrix.
        scale_RG, code, private: as `decode` has them.
    """
    private_RC = unpack_planes(own, num_columns) if own else None
    return decode(unpack_planes(shared, num_columns), scale_RG, code, private_RC, private)

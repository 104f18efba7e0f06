"""Nested experts as the kernels read them: where codes lie, and which way they are decoded.

Imports no Triton, which a CPU build of torch lacks: what is decided here is tested there.

Legend: F faces, S slots, R rows, C columns, J words of a plane's row, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moeruntime.codes import NestedCode, PrivateCode

__all__ = ["GROUP", "ROWS", "WARPS", "FacePart", "is_fast"]

WARPS, ROWS = 4, 32
"""Warps of a program of `nested_fast.cu`, and rows of weights that it takes."""

GROUP = 128
"""Columns that have one scale, as the kernel wants it."""

MAX_FACES = 32 * WARPS
"""Faces of a layer that the kernel looks through, a thread each."""


@dataclass(frozen=True, slots=True)
class FacePart:
    """One part of all faces of a layer, as the kernels read it.

    Attributes:
        num_rows, num_columns: R and C.
        shared_bits, group: of the slots' code.
        planes: width -> int16 words [slots, rows, J]; widths that the code has none of are absent.
        scale_SRG: bfloat16.
        faces_F6: int64; slot, private bits, step, and the addresses of the private planes
            [rows, J] of width 4, 2 and 1, 0 where there is none. Whoever made it keeps them alive.
        num_planes: private planes that a face has at most; three bits are two.
    """

    num_rows: int
    num_columns: int
    shared_bits: int
    group: int
    planes: dict[int, Tensor]
    scale_SRG: Tensor
    faces_F6: Tensor
    num_planes: int


def is_fast(code: NestedCode, shape: tuple[int, int], private: Sequence[PrivateCode]) -> bool:
    """Whether the kernel serves a matrix [R, C] of these faces.

    Its tiles must fit, and no constant need rounding.
    """
    num_rows, num_columns = shape
    if code != NestedCode(4, GROUP) or num_columns % 2048 or num_rows % (2 * ROWS):
        return False
    return len(private) <= MAX_FACES and all(_constant(one) < 1024 for one in private)


def _constant(code: PrivateCode) -> float:
    """What is subtracted from a level; float16 has halves below 1024."""
    high = 2 * code.step if code.bits == 3 else code.step
    magic = 64.0 * (high + (code.step if code.bits == 3 else 0))
    return 512 + 60 + magic + code.step * ((1 << code.bits) - 1) / 2

"""Nested experts as the kernels read them: where codes lie, and which faces share unpacking.

Imports no Triton, which a CPU build of torch lacks: what is decided here is tested there.

Legend: F faces, S slots, R rows, C columns, J words of a plane's row, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moeruntime.codes import NestedCode, PrivateCode

__all__ = ["DOWN_PARTS", "GROUP", "ROWS", "WARPS", "Cut", "FacePart", "FastPart", "is_fast"]

WARPS, ROWS = 4, 32
"""Warps of a program of `nested_fast.cu`, and rows of weights that it takes."""

GROUP = 128
"""Columns that have one scale, as the kernel wants it."""

MAX_GROUPS = 32 * WARPS
DOWN_PARTS = 2
"""Parts that `down` comes in: it has few rows and many columns."""

FEW_PAIRS = 32
"""So many pairs leave the device to blocks whose warps share rows."""


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
    """

    num_rows: int
    num_columns: int
    shared_bits: int
    group: int
    planes: dict[int, Tensor]
    scale_SRG: Tensor
    faces_F6: Tensor


def is_fast(code: NestedCode, shape: tuple[int, int], private: Sequence[PrivateCode]) -> bool:
    """Whether the kernel serves a matrix: it tiles it, and no constant needs rounding."""
    num_rows, num_columns = shape
    if code != NestedCode(4, GROUP) or num_columns % 2048 or num_rows % (2 * ROWS * WARPS):
        return False
    return all(_constant(one) < 1024 for one in private)


def _constant(code: PrivateCode) -> float:
    """What is subtracted from a level; float16 has halves below 1024."""
    high = 2 * code.step if code.bits == 3 else code.step
    magic = 64.0 * (high + (code.step if code.bits == 3 else 0))
    return 512 + 60 + magic + code.step * ((1 << code.bits) - 1) / 2


class Cut(NamedTuple):
    """Faces a group, tiles of eight tokens a face, and warps of a block that take other rows."""

    faces: int
    tiles: int
    row_warps: int


@dataclass(frozen=True, slots=True)
class FastPart:
    """A part and the groups of its faces.

    Attributes:
        part: codes and faces.
        groups: number of faces a group -> int32 [groups, faces], -1 where a group is not full.
        planes: private planes that a face has at most; three bits are two.
    """

    part: FacePart
    groups: dict[int, Tensor]
    planes: int

    @classmethod
    def of(cls, part: FacePart) -> FastPart | None:
        """Group the faces; None where there are more groups than the kernel takes."""
        table = part.faces_F6.tolist()
        planes = max(2 if row[1] == 3 else min(row[1], 1) for row in table)
        groups = {}
        for size in (1, 2) if planes == 2 else (1, 2, 4):  # as many as registers hold
            rows: list[list[int]] = []
            for slot in sorted({row[0] for row in table}):
                faces = [face for face, row in enumerate(table) if row[0] == slot]
                for start in range(0, len(faces), size):
                    some = faces[start : start + size]
                    rows.append(some + [-1] * (size - len(some)))
            if len(rows) > MAX_GROUPS:
                return None
            groups[size] = torch.tensor(rows, dtype=torch.int32, device=part.scale_SRG.device)
        return cls(part, groups, planes)

    def cut(self, num_pairs: int) -> Cut:
        """How a step of so many pairs is cut."""
        num_faces, slots = len(self.part.faces_F6), self.part.scale_SRG.shape[0]
        a_face = num_pairs / num_faces
        tiles = 1 if a_face <= 4 else 2 if a_face <= 12 else 4 if a_face <= 24 else 8
        faces = max(self.groups) if num_faces > slots and tiles <= 2 else 1
        return Cut(faces, tiles, 1 if num_pairs <= FEW_PAIRS else WARPS)

"""The experts of a step over nested codes, at the speed of their bytes: `nested_fast.cu`.

For the codes and shapes of real models (`is_fast`); `nested` serves all others. Activations go in
as float16, in which every level is exact; routing weights and sums are float32.

A launch takes several faces of one slot at once, so what variants have in common is read and
unpacked once. Which faces go together is a table: a row a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moeruntime.codes import NestedCode, PrivateCode
from moeruntime.kernels.nested import FacePart
from moeruntime.kernels.norms import FaceLists
from moeruntime.kernels.nvrtc import Kernel, compile_kernel

__all__ = ["DOWN_PARTS", "FastPart", "down", "gate_up", "is_fast"]

SOURCE = Path(__file__).with_suffix(".cu")
WARPS, ROWS = 4, 32
GROUP = 128
MAX_GROUPS = 32 * WARPS
DOWN_PARTS = 2
"""Parts that `down` comes in: it has few rows and many columns."""

FEW_PAIRS = 32
"""So many pairs leave the device to blocks whose warps share rows."""


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


def gate_up(x_TH: Tensor, fast: FastPart, lists: FaceLists, layer: int, *, out_MI: Tensor) -> None:
    """silu(gate_proj x) * (up_proj x) of every pair, as `experts.gate_up`; float16 in and out."""
    _launch(fast, x_TH, out_MI, lists, layer, x_TH.shape[0] * lists.weights_TK.shape[1], True)


def down(x_MI: Tensor, fast: FastPart, lists: FaceLists, layer: int, *, out_MSH: Tensor) -> None:
    """down_proj of every pair, times its routing weight, as `experts.down`."""
    _launch(fast, x_MI, out_MSH, lists, layer, x_MI.shape[0], False)


def _launch(
    fast: FastPart,
    x: Tensor,
    out: Tensor,
    lists: FaceLists,
    layer: int,
    num_pairs: int,
    is_gate_up: bool,
) -> None:
    assert x.dtype == torch.float16 and x.is_contiguous()
    part, cut = fast.part, fast.cut(num_pairs)
    groups, tokens = fast.groups[cut.faces], 8 * cut.tiles
    num_parts = 1 if is_gate_up else out.shape[1]
    num_works = min(num_pairs, len(groups) + num_pairs // tokens)
    items, stages = 4 + 4 * cut.faces * fast.planes, 3 if cut.faces == 1 else 2
    ring_bytes = 16 * 32 * WARPS * stages * items
    scale_bytes = 2 * ROWS * cut.row_warps * part.num_columns // GROUP
    _kernel(cut, fast.planes, is_gate_up)(
        (num_works, part.num_rows // (ROWS * cut.row_warps), num_parts),
        32 * WARPS,
        (
            x, part.planes[4], part.scale_SRG, part.faces_F6, groups, lists.counts_LF[layer],
            lists.pairs_LFC[layer], lists.weights_TK, out,
            len(groups), lists.pairs_LFC.shape[2], part.num_rows, part.num_columns,
            lists.weights_TK.shape[1],
        ),
        shared_bytes=scale_bytes + max(ring_bytes, 4 * WARPS * ROWS * (tokens + 1)),
    )  # fmt: skip


def _kernel(cut: Cut, planes: int, is_gate_up: bool) -> Kernel:
    defines = (
        ("FACES", cut.faces),
        ("TILES", cut.tiles),
        ("ROW_WARPS", cut.row_warps),
        ("PLANES", planes),
        ("GATE_UP", int(is_gate_up)),
    )
    return compile_kernel(SOURCE, "nested", defines)

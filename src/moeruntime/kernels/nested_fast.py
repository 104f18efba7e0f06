"""The experts of a step over nested codes, at the speed of their bytes: `nested_fast.cu`.

For the codes and shapes of real models (`is_fast`); `nested` serves all others. Activations go in
as float16, in which every level is exact; routing weights and sums are float32.

A launch takes several faces of one slot at once, so what variants have in common is read and
unpacked once. Which faces go together is a table: a row a group.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.face_parts import GROUP, ROWS, WARPS, Cut, FastPart
from moeruntime.kernels.nvrtc import Kernel, compile_kernel

__all__ = ["down", "gate_up"]

SOURCE = Path(__file__).with_suffix(".cu")


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

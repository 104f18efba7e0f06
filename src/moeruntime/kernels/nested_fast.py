"""The experts of a step over nested codes, at the speed of their bytes: `nested_fast.cu`.

For the codes and shapes of real models (`is_fast`); `nested` serves all others. Activations go in
as float16, in which every level is exact; routing weights and sums are float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.face_parts import GROUP, ROWS, WARPS, FacePart
from moeruntime.kernels.nvrtc import compile_kernel

__all__ = ["down", "gate_up"]

SOURCE = Path(__file__).with_suffix(".cu")
STAGES = 3  # as in the source


def gate_up(x_TH: Tensor, part: FacePart, lists: FaceLists, layer: int, *, out_MI: Tensor) -> None:
    """silu(gate_proj x) * (up_proj x) of every pair, as `experts.gate_up`; float16 in and out."""
    _launch(part, x_TH, out_MI, lists, layer, x_TH.shape[0] * lists.weights_TK.shape[1], True)


def down(x_MI: Tensor, part: FacePart, lists: FaceLists, layer: int, *, out_MSH: Tensor) -> None:
    """down_proj of every pair, times its routing weight, as `experts.down`; in one part."""
    _launch(part, x_MI, out_MSH, lists, layer, x_MI.shape[0], False)


def _launch(
    part: FacePart,
    x: Tensor,
    out: Tensor,
    lists: FaceLists,
    layer: int,
    num_pairs: int,
    is_gate_up: bool,
) -> None:
    assert x.dtype == torch.float16 and x.is_contiguous()
    num_faces = len(part.faces_F6)
    a_face = num_pairs / num_faces
    tiles = 1 if a_face <= 4 else 2 if a_face <= 32 else 4
    tokens = 8 * tiles
    defines = (("TILES", tiles), ("PLANES", part.num_planes), ("GATE_UP", int(is_gate_up)))
    ring_bytes = 16 * 32 * WARPS * STAGES * (4 + 4 * part.num_planes)
    scale_bytes = 2 * ROWS * part.num_columns // GROUP
    compile_kernel(SOURCE, "nested", defines)(
        (lists.num_tiles(num_pairs, tokens), part.num_rows // ROWS, 1),
        32 * WARPS,
        (
            x, part.planes[4], part.scale_SRG, part.faces_F6, lists.counts_LF[layer],
            lists.pairs_LFC[layer], lists.weights_TK, out, num_faces, lists.pairs_LFC.shape[2],
            part.num_rows, part.num_columns, lists.weights_TK.shape[1],
        ),
        shared_bytes=scale_bytes + max(ring_bytes, 4 * WARPS * ROWS * (tokens + 1)),
    )  # fmt: skip

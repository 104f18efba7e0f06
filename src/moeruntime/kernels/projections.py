"""Triton kernel for a dense product of few tokens of mixed variants.

A variant's weights are one more dimension: tokens are sorted by resident slot and cut into tiles,
each of one slot, so a batch of mixed variants is one launch, and the bytes of a variant's weights
are read once where its tokens fit one tile (and from the L2 cache after that). The tiles are data,
not launch parameters: a captured graph serves any mixture.

Legend: T tokens, I inputs, O outputs, R resident slots, N tiles, S parts the inputs are cut into.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeruntime.kernels.chain import begin_chained, chained
from moeruntime.kernels.shapes import Shape

__all__ = ["project"]


@triton.jit(do_not_specialize=("num_tiles",))
def _project_kernel(
    x, weight, out, tiles, slot_stride, num_tiles,
    I: tl.constexpr, O: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    TOKENS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0), tl.program_id(2)
    slot = tl.load(tiles + tile).to(tl.int64)
    start, stop = tl.load(tiles + num_tiles + tile), tl.load(tiles + 2 * num_tiles + tile)
    begin_chained(CHAINED)
    if slot < 0:
        return
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    tokens = start + tl.arange(0, TOKENS)
    columns = tl.arange(0, STEP)
    per_part: tl.constexpr = tl.cdiv(I, STEP * PARTS) * STEP
    weight += slot * slot_stride + rows[:, None].to(tl.int64) * I + part * per_part
    x += tokens[None, :] * I + part * per_part
    rows_in, tokens_in = (rows < O)[:, None], (tokens < stop)[None, :]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for at in tl.range(0, per_part, STEP):
        here = at + columns
        if I % (STEP * PARTS) == 0 and O % ROWS == 0:
            w = tl.load(weight + here[None, :])
            x_tile = tl.load(x + here[:, None], tokens_in, other=0.0)
        else:
            inside = part * per_part + here < I
            w = tl.load(weight + here[None, :], rows_in & inside[None, :], other=0.0)
            x_tile = tl.load(x + here[:, None], tokens_in & inside[:, None], other=0.0)
        sums = tl.dot(w, x_tile, sums, input_precision=PRECISION)
    target = out + (tokens[None, :] * PARTS + part) * O + rows[:, None]
    tl.store(target, sums.to(out.dtype.element_ty), rows_in & tokens_in)


def project(
    x_TI: Tensor, weight_ROI: Tensor, tiles_3N: Tensor, shape: Shape, *, out: Tensor
) -> None:
    """Multiply each token by the weights of its own variant.

    Args:
        x_TI: inputs, sorted by resident slot.
        weight_ROI: one [O, I] matrix a resident slot; slot stride 0 where all variants share one.
        tiles_3N: int32 slots, starts and stops of `tile_rows`.
        shape: how the work is cut.
        out: [T, S, O]; its parts are to be added up. One part may be in any dtype.
    """
    num_out, num_in = weight_ROI.shape[1:]
    num_tiles = tiles_3N.shape[1]
    _project_kernel[(num_tiles, triton.cdiv(num_out, shape.rows), shape.parts)](
        x_TI, weight_ROI, out, tiles_3N, weight_ROI.stride(0), num_tiles,
        I=num_in, O=num_out, ROWS=shape.rows, STEP=shape.step, TOKENS=shape.tokens,
        PARTS=shape.parts, PRECISION="ieee" if x_TI.dtype == torch.float32 else "tf32",
        num_warps=shape.warps, num_stages=shape.stages, **chained(x_TI.device),
    )  # fmt: skip

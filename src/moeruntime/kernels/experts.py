"""Triton kernels for the experts of a decode step: weights as they are.

Tokens are few, so each byte of an expert is read once and that is the time it takes. A program
takes some rows of one face's weights against a tile of the tokens on its list, tokens of all
variants together. Faces without tokens cost nothing: programs count over the active ones.

Legend: T tokens, K experts a token, F faces, H hidden, I intermediate, S parts of the inner
dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeruntime.kernels.chain import begin_chained, chained
from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.norms import find_tile
from moeruntime.kernels.shapes import Shape

__all__ = ["down", "gate_up"]


@triton.jit(do_not_specialize=("capacity",))
def _gate_up_kernel(
    x, weight, out, counts, pairs, capacity, face_stride,
    F: tl.constexpr, H: tl.constexpr, I: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
    TOKENS: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    begin_chained(CHAINED)
    face, first, count = find_tile(counts, tl.program_id(0), F, TOKENS)
    if face >= F:
        return
    place = first + tl.arange(0, TOKENS)
    face = face.to(tl.int64)
    pair = tl.load(pairs + face * capacity + place, place < count, other=0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, STEP)
    weight += face * face_stride + rows[:, None].to(tl.int64) * H
    x += (pair // K)[None, :] * H
    rows_in, pairs_in = (rows < I)[:, None], (place < count)[None, :]
    gate = tl.zeros((ROWS, TOKENS), tl.float32)
    up = tl.zeros((ROWS, TOKENS), tl.float32)
    for at in tl.range(0, H, STEP):
        here = at + columns
        if H % STEP == 0 and I % ROWS == 0:
            gate_w = tl.load(weight + here[None, :], eviction_policy="evict_first")
            up_w = tl.load(weight + I * H + here[None, :], eviction_policy="evict_first")
            # Rows without a token are not fetched: what they would cost is not memory's time, but
            # that of the way from the cache to the multiprocessors.
            x_tile = tl.load(x + here[:, None], pairs_in, other=0.0)
        else:
            inside = rows_in & (here < H)[None, :]
            gate_w = tl.load(weight + here[None, :], inside, other=0.0)
            up_w = tl.load(weight + I * H + here[None, :], inside, other=0.0)
            x_tile = tl.load(x + here[:, None], (here < H)[:, None] & pairs_in, other=0.0)
        gate = tl.dot(gate_w, x_tile, gate, input_precision=PRECISION)
        up = tl.dot(up_w, x_tile, up, input_precision=PRECISION)
    inner = gate / (1.0 + tl.exp(-gate)) * up
    target = out + pair[None, :] * I + rows[:, None]
    tl.store(target, inner.to(out.dtype.element_ty), rows_in & pairs_in)


def gate_up(
    x_TH: Tensor, weight_FIH: Tensor, lists: FaceLists, layer: int, shape: Shape, *, out_MI: Tensor
) -> None:
    """silu(gate_proj x) * (up_proj x) of every pair.

    Args:
        x_TH: expert inputs.
        weight_FIH: gate_proj's rows, then up_proj's, of every face: [F, 2I, H].
        lists: the pairs of each face.
        layer: whose lists.
        shape: how the work is cut.
        out_MI: a row for each pair, token * K + choice.
    """
    num_tokens, hidden = x_TH.shape
    inner, top_k = weight_FIH.shape[1] // 2, lists.weights_TK.shape[1]
    num_pairs = num_tokens * top_k
    grid = (lists.num_tiles(num_pairs, shape.tokens), triton.cdiv(inner, shape.rows))
    _gate_up_kernel[grid](
        x_TH, weight_FIH, out_MI,
        lists.counts_LF[layer], lists.pairs_LFC[layer], lists.pairs_LFC.shape[2],
        weight_FIH.stride(0),
        F=lists.counts_LF.shape[1], H=hidden, I=inner, K=top_k,
        ROWS=shape.rows, STEP=shape.step, TOKENS=shape.tokens,
        PRECISION="ieee" if x_TH.dtype == torch.float32 else "tf32",
        num_warps=shape.warps, num_stages=shape.stages, **chained(x_TH.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=("capacity",))
def _down_kernel(
    x, weight, out, weights_TK, counts, pairs, capacity, face_stride,
    F: tl.constexpr, I: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    TOKENS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    # The lists were complete before gate_up began.
    face, first, count = find_tile(counts, tl.program_id(0), F, TOKENS)
    part = tl.program_id(2)
    place = first + tl.arange(0, TOKENS)
    pairs_in = (place < count) & (face < F)
    face = face.to(tl.int64)
    pair = tl.load(pairs + face * capacity + place, pairs_in, other=0)
    begin_chained(CHAINED)
    if face >= F:
        return
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, STEP)
    per_part: tl.constexpr = tl.cdiv(I, STEP * PARTS) * STEP
    weight += face * face_stride + rows[:, None].to(tl.int64) * I + part * per_part
    x += pair[None, :] * I + part * per_part
    rows_in = (rows < H)[:, None]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for at in tl.range(0, per_part, STEP):
        here = at + columns
        if I % (STEP * PARTS) == 0 and H % ROWS == 0:
            w = tl.load(weight + here[None, :], eviction_policy="evict_first")
            x_tile = tl.load(x + here[:, None], pairs_in[None, :], other=0.0)
        else:
            inside = part * per_part + here < I
            w = tl.load(weight + here[None, :], rows_in & inside[None, :], other=0.0)
            x_tile = tl.load(x + here[:, None], inside[:, None] & pairs_in[None, :], other=0.0)
        sums = tl.dot(w, x_tile, sums, input_precision=PRECISION)
    sums *= tl.load(weights_TK + pair, pairs_in, other=0.0)[None, :]
    target = out + (pair[None, :] * PARTS + part) * H + rows[:, None]
    tl.store(target, sums, rows_in & pairs_in[None, :])


def down(
    x_MI: Tensor, weight_FHI: Tensor, lists: FaceLists, layer: int, shape: Shape, *, out_MSH: Tensor
) -> None:
    """down_proj of every pair, times its routing weight, in parts to be added up.

    Args:
        x_MI: a row for each pair.
        weight_FHI: down_proj of every face.
        lists: the pairs of each face.
        layer: whose lists.
        shape: how the work is cut.
        out_MSH: float32; a token's K * S parts follow each other.
    """
    num_pairs, inner = x_MI.shape
    hidden = weight_FHI.shape[1]
    tiles = lists.num_tiles(num_pairs, shape.tokens)
    grid = (tiles, triton.cdiv(hidden, shape.rows), shape.parts)
    _down_kernel[grid](
        x_MI, weight_FHI, out_MSH, lists.weights_TK,
        lists.counts_LF[layer], lists.pairs_LFC[layer], lists.pairs_LFC.shape[2],
        weight_FHI.stride(0),
        F=lists.counts_LF.shape[1], I=inner, H=hidden,
        ROWS=shape.rows, STEP=shape.step, TOKENS=shape.tokens,
        PARTS=shape.parts, PRECISION="ieee" if x_MI.dtype == torch.float32 else "tf32",
        num_warps=shape.warps, num_stages=shape.stages, **chained(x_MI.device),
    )  # fmt: skip

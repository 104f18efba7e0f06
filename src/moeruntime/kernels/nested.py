"""Triton kernels for nested codes of any kind: decoded inside the product, or a few faces at once.

`gate_up` and `down` gather each weight's bits one by one, which serves any code and any shape,
and is slow: the codes and shapes of real models have `nested_fast`. For many tokens, decoding faces
into memory first (`decode_faces`) costs little beside the products that follow.

Legend: M rows of a program, N tokens of a tile, C columns, J bytes of a plane's row, F faces.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.face_parts import FacePart
from moeruntime.kernels.norms import find_tile
from moeruntime.kernels.shapes import Shape

__all__ = ["can_decode", "decode_faces", "down", "gate_up"]


@triton.jit
def _gather(plane, columns, inside, C: tl.constexpr, WIDTH: tl.constexpr):
    """Fields of one plane at `columns`; `plane` points at each row's first byte."""
    J: tl.constexpr = (C * WIDTH + 7) // 8
    byte = tl.load(plane + columns % J, inside, other=0).to(tl.int32)
    return (byte >> (columns // J * WIDTH)) & (2**WIDTH - 1)


@triton.jit
def _product(
    plane4, plane2, plane1, scales, face, rows, own, rows_in, x, pairs_in,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows [M] of one face's matrix times the tokens [N] whose columns begin at `x`."""
    J4: tl.constexpr = (C * 4 + 7) // 8
    J2: tl.constexpr = (C * 2 + 7) // 8
    J1: tl.constexpr = (C + 7) // 8
    bits, step = tl.load(face + 1), tl.load(face + 2)
    own = own[:, None]
    own4 = tl.load(face + 3).to(tl.pointer_type(tl.uint8)) + own * J4
    own2 = tl.load(face + 4).to(tl.pointer_type(tl.uint8)) + own * J2
    own1 = tl.load(face + 5).to(tl.pointer_type(tl.uint8)) + own * J1
    scales += rows[:, None] * ((C + GROUP - 1) // GROUP)
    rows = rows[:, None]
    centre = (2**SHARED - 1) * 2 ** (7 - SHARED) * 0.5
    centre += step.to(tl.float32) * ((tl.full((), 1, tl.int32) << bits.to(tl.int32)) - 1) * 0.5
    sums = tl.zeros((M, N), tl.float32)
    for at in tl.range(0, C, STEP):
        columns = at + tl.arange(0, STEP)
        columns_in = columns < C
        inside = rows_in[:, None] & columns_in[None, :]
        column = tl.where(columns_in, columns, 0)[None, :]
        shared = tl.zeros((M, STEP), tl.int32)
        if SHARED & 4:
            shared = _gather(plane4 + rows * J4, column, inside, C, 4)
        if SHARED & 2:
            shared = (shared << 2) | _gather(plane2 + rows * J2, column, inside, C, 2)
        if SHARED & 1:
            shared = (shared << 1) | _gather(plane1 + rows * J1, column, inside, C, 1)
        level = shared << (7 - SHARED)
        refined = tl.zeros((M, STEP), tl.int32)
        if (bits & 4) != 0:
            refined = _gather(own4, column, inside, C, 4)
        if (bits & 2) != 0:
            refined = (refined << 2) | _gather(own2, column, inside, C, 2)
        if (bits & 1) != 0:
            refined = (refined << 1) | _gather(own1, column, inside, C, 1)
        level += refined * step.to(tl.int32)
        scale = tl.load(scales + column // GROUP, inside, other=0.0).to(tl.float32)
        x_in = columns_in[:, None] & pairs_in[None, :]
        x_tile = tl.load(x + columns[:, None], x_in, other=0.0)
        weights = ((level.to(tl.float32) - centre) * scale).to(x_tile.dtype)
        sums = tl.dot(weights, x_tile, sums, input_precision=PRECISION)
    return sums


@triton.jit(do_not_specialize=("capacity",))
def _nested_gate_up_kernel(
    x, plane4, plane2, plane1, scales, faces, out,
    counts, pairs, capacity,
    F: tl.constexpr, H: tl.constexpr, I: tl.constexpr, K: tl.constexpr,
    SHARED: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    number, first, count = find_tile(counts, tl.program_id(0), F, TOKENS)
    if number >= F:
        return
    place = first + tl.arange(0, TOKENS)
    pairs_in = place < count
    pair = tl.load(pairs + number.to(tl.int64) * capacity + place, pairs_in, other=0)
    face = faces + number * 6
    # Half of the rows are gate_proj's, the other half up_proj's of the same neurons.
    lane = tl.arange(0, 2 * ROWS)
    neuron = tl.program_id(1) * ROWS + lane % ROWS
    own = (lane // ROWS) * I + neuron
    both = _product(
        plane4, plane2, plane1, scales, face, tl.load(face) * (2 * I) + own, own, neuron < I,
        x + (pair // K)[None, :] * H, pairs_in, 2 * ROWS, TOKENS, H, SHARED, GROUP, STEP, PRECISION,
    )  # fmt: skip
    gate, up = both.reshape(2, ROWS, TOKENS).permute(1, 2, 0).split()
    inner = gate / (1.0 + tl.exp(-gate)) * up
    neurons = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    target = out + pair[None, :] * I + neurons[:, None]
    tl.store(target, inner.to(out.dtype.element_ty), (neurons < I)[:, None] & pairs_in[None, :])


@triton.jit(do_not_specialize=("capacity",))
def _nested_down_kernel(
    x, plane4, plane2, plane1, scales, faces, out, weights_TK,
    counts, pairs, capacity,
    F: tl.constexpr, I: tl.constexpr, H: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    number, first, count = find_tile(counts, tl.program_id(0), F, TOKENS)
    if number >= F:
        return
    place = first + tl.arange(0, TOKENS)
    pairs_in = place < count
    pair = tl.load(pairs + number.to(tl.int64) * capacity + place, pairs_in, other=0)
    face = faces + number * 6
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    sums = _product(
        plane4, plane2, plane1, scales, face, tl.load(face) * H + row, row, row < H,
        x + pair[None, :] * I, pairs_in,
        ROWS, TOKENS, I, SHARED, GROUP, STEP, PRECISION,
    )  # fmt: skip
    sums *= tl.load(weights_TK + pair, pairs_in, other=0.0)[None, :]
    target = out + pair[None, :] * H + row[:, None]
    tl.store(target, sums, (row < H)[:, None] & pairs_in[None, :])


@triton.jit
def _words(
    plane, row, at,
    R: tl.constexpr, J: tl.constexpr, WORDS: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """Words of each row's bytes from `at` on, a multiple of theirs; `plane` is R rows of J bytes.

    STRIPS: as `strips` puts it, and of gate_up for 2.
    """
    at = at // 4 + tl.arange(0, WORDS)[None, :]
    if STRIPS:
        half: tl.constexpr = 16
        if STRIPS == 2:
            row = row % (R // 2) // half * (2 * half) + row // (R // 2) * half + row % half
        at = (at // 32 * R + row) * 32 + (at % 32 ^ row % 2 * 16)
    else:
        at += row * (J // 4)
    # Planes and their rows begin at multiples of 16 bytes, which the compiler cannot see.
    places = plane.to(tl.pointer_type(tl.int32)) + tl.max_contiguous(at, (1, 4))
    return tl.load(tl.multiple_of(places, (1, 16)))


@triton.jit
def _codes_of(
    plane4, plane2, plane1, row, at, RUN: tl.constexpr, WHICH: tl.constexpr, BITS: tl.constexpr,
    R: tl.constexpr, WORDS: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Codes of BITS bits, a byte each, of columns from `at` on in the run that is WHICH of 8.

    A run has RUN columns, and a plane of width W has W runs of bytes: its field at a column is of
    run WHICH % W, WHICH // W fields up. Four columns at a time: no field reaches another's byte.
    """
    code = tl.zeros((ROWS, WORDS), tl.int32)
    if BITS & 4:
        word = _words(plane4, row, at + WHICH % 4 * RUN, R, 4 * RUN, WORDS, STRIPS)
        code = (word >> (WHICH // 4 * 4)) & 0x0F0F0F0F
    if BITS & 2:
        word = _words(plane2, row, at + WHICH % 2 * RUN, R, 2 * RUN, WORDS, STRIPS)
        code = (code << 2) | ((word >> (WHICH // 2 * 2)) & 0x03030303)
    if BITS & 1:
        word = _words(plane1, row, at, R, RUN, WORDS, STRIPS)
        code = (code << 1) | ((word >> WHICH) & 0x01010101)
    return code


@triton.jit
def _weights(
    levels, row_scales, first, centre, BYTE: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Weights, in float32, of the levels in a byte of each word; `first` is the first column."""
    if GROUP % (4 * WORDS) == 0:  # one scale for all of them
        scale = tl.load(row_scales + first // GROUP)[:, None]
    else:
        column = first + 4 * tl.arange(0, WORDS)[None, :] + BYTE
        scale = tl.load(row_scales[:, None] + column // GROUP)
    scale = scale.to(tl.float32)
    # 2 ** 23 and the level: to subtract that is faster than to convert. Nothing here is rounded.
    number = ((levels >> (8 * BYTE)) & 255) | 0x4B000000
    return (number.to(tl.float32, bitcast=True) - 8388608.0) * scale - centre * scale


@triton.jit(do_not_specialize=("first_face",))
def _decode_kernel(
    plane4, plane2, plane1, scales, faces, counts, out, first_face,
    R: tl.constexpr, C: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    number = first_face + tl.program_id(2)
    if tl.load(counts + number) == 0:
        return
    RUN: tl.constexpr = C // 8
    face = faces + number * 6
    slot, bits, step = tl.load(face), tl.load(face + 1), tl.load(face + 2)
    own4 = tl.load(face + 3).to(tl.pointer_type(tl.uint8))
    own2 = tl.load(face + 4).to(tl.pointer_type(tl.uint8))
    own1 = tl.load(face + 5).to(tl.pointer_type(tl.uint8))
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (rows < R)[:, None]
    rows = tl.where(rows < R, rows, 0).to(tl.int64)
    row = rows[:, None]
    plane4 += slot * (R * 4 * RUN)
    plane2 += slot * (R * 2 * RUN)
    plane1 += slot * (R * RUN)
    row_scales = scales + (slot * R + rows) * ((C + GROUP - 1) // GROUP)
    centre = (2**SHARED - 1) * 2 ** (7 - SHARED) * 0.5
    centre += step.to(tl.float32) * ((tl.full((), 1, tl.int32) << bits.to(tl.int32)) - 1) * 0.5
    at = tl.program_id(0) * (4 * WORDS)
    for which in tl.static_range(8):
        shared = _codes_of(
            plane4, plane2, plane1, row, at, RUN, which, SHARED, R, WORDS, STRIPS, ROWS
        )  # fmt: skip
        refined = tl.zeros((ROWS, WORDS), tl.int32)
        for width in tl.static_range(1, 5):
            if bits == width:
                refined = _codes_of(
                    own4, own2, own1, row, at, RUN, which, width, R, WORDS, STRIPS, ROWS
                )  # fmt: skip
        levels = (shared << (7 - SHARED)) + refined * step.to(tl.int32)
        first = at + which * RUN
        even = tl.join(
            _weights(levels, row_scales, first, centre, 0, WORDS, GROUP),
            _weights(levels, row_scales, first, centre, 2, WORDS, GROUP),
        )
        odd = tl.join(
            _weights(levels, row_scales, first, centre, 1, WORDS, GROUP),
            _weights(levels, row_scales, first, centre, 3, WORDS, GROUP),
        )
        weights = tl.join(even, odd).reshape(ROWS, 4 * WORDS)
        column = first + tl.arange(0, 4 * WORDS)[None, :]
        to = out + (tl.program_id(2).to(tl.int64) * R + row) * C + column
        tl.store(to, weights.to(out.dtype.element_ty), inside)


def can_decode(part: FacePart) -> bool:
    """Whether `decode_faces` serves this part: planes must keep one pace."""
    return part.num_columns % 128 == 0


def decode_faces(part: FacePart, first: int, counts_F: Tensor, *, out_FRC: Tensor) -> None:
    """Decode some faces' weights.

    Args:
        part: codes.
        first: the first face; the others follow it.
        counts_F: tokens of every face of the layer; what nobody wants is left undecoded.
        out_FRC: as many faces as are to be decoded.
    """
    num_faces, num_rows, num_columns = out_FRC.shape
    run = num_columns // 8
    step = min(128, run & -run)
    rows = 4096 // step
    _decode_kernel[(run // step, triton.cdiv(num_rows, rows), num_faces)](
        *_codes(part), counts_F, out_FRC, first,
        R=num_rows, C=num_columns, SHARED=part.shared_bits, GROUP=part.group,
        ROWS=rows, WORDS=step // 4, STRIPS=part.in_strips * (1 + part.is_gate_up), num_warps=4,
    )  # fmt: skip


def _codes(part: FacePart) -> tuple[Tensor, ...]:
    """The part's tensors in the kernels' order; absent planes are never read."""
    first = next(iter(part.planes.values()))
    planes = (part.planes.get(width, first) for width in (4, 2, 1))
    return (*planes, part.scale_SRG, part.faces_F6)


def gate_up(
    x_TH: Tensor, part: FacePart, lists: FaceLists, layer: int, shape: Shape, *, out_MI: Tensor
) -> None:
    """silu(gate_proj x) * (up_proj x) of every pair, as `experts.gate_up`."""
    num_tokens, hidden = x_TH.shape
    inner, top_k = part.num_rows // 2, lists.weights_TK.shape[1]
    num_pairs = num_tokens * top_k
    grid = (lists.num_tiles(num_pairs, shape.tokens), triton.cdiv(inner, shape.rows))
    _nested_gate_up_kernel[grid](
        x_TH, *_codes(part), out_MI,
        lists.counts_LF[layer], lists.pairs_LFC[layer], lists.pairs_LFC.shape[2],
        F=lists.counts_LF.shape[1], H=hidden, I=inner, K=top_k,
        SHARED=part.shared_bits, GROUP=part.group, ROWS=shape.rows,
        STEP=shape.step, TOKENS=shape.tokens,
        PRECISION="ieee" if x_TH.dtype == torch.float32 else "tf32",
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip


def down(
    x_MI: Tensor, part: FacePart, lists: FaceLists, layer: int, shape: Shape, *, out_MSH: Tensor
) -> None:
    """down_proj of every pair, times its routing weight, as `experts.down`; one part."""
    num_pairs, inner = x_MI.shape
    grid = (lists.num_tiles(num_pairs, shape.tokens), triton.cdiv(part.num_rows, shape.rows))
    _nested_down_kernel[grid](
        x_MI, *_codes(part), out_MSH, lists.weights_TK,
        lists.counts_LF[layer], lists.pairs_LFC[layer], lists.pairs_LFC.shape[2],
        F=lists.counts_LF.shape[1], I=inner, H=part.num_rows,
        SHARED=part.shared_bits, GROUP=part.group, ROWS=shape.rows,
        STEP=shape.step, TOKENS=shape.tokens,
        PRECISION="ieee" if x_MI.dtype == torch.float32 else "tf32",
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip

"""Triton kernels for the small steps between the products of a decode step.

Each adds what the products before it left behind and prepares what the next one reads, so that a
layer is few launches. The residual stream is float32. Partial results come as `parts_TPH`, added up
in order: nothing here depends on which program finished first.

Legend: T tokens, P parts, H hidden, E logical experts, K experts a token, F faces, R resident
slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeruntime.kernels.chain import begin_chained, chained
from moeruntime.kernels.face_lists import FaceLists

__all__ = ["add_norm", "find_tile", "gated", "in_order", "route"]

EXPERTS_AT_ONCE = 8
MAX_WARPS = 16


@triton.jit
def _sum_parts(
    residual, parts, rows, shares, token, offsets, inside, P: tl.constexpr, H: tl.constexpr,
    GATHERED: tl.constexpr,
):  # fmt: skip
    """One token's residual with its parts added."""
    x = tl.load(residual + token.to(tl.int64) * H + offsets, inside, other=0.0)
    for part in tl.static_range(P):
        if GATHERED:
            row = tl.load(rows + token * P + part).to(tl.int64)
            more = tl.load(parts + row * H + offsets, inside, other=0.0).to(tl.float32)
            x += more * tl.load(shares + token * P + part)
        else:
            row = token.to(tl.int64) * P + part
            x += tl.load(parts + row * H + offsets, inside, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize_on_alignment=("slot_T",))
def _add_norm_kernel(
    residual, parts, rows, shares, weight, slot_T, out, slot_stride, eps,
    P: tl.constexpr, H: tl.constexpr, ROW: tl.constexpr, GATHERED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    offsets = tl.arange(0, ROW)
    inside = offsets < H
    slot = tl.load(slot_T + token)
    norm = tl.load(weight + slot * slot_stride + offsets, inside, other=0.0)
    begin_chained(CHAINED)
    x = _sum_parts(residual, parts, rows, shares, token, offsets, inside, P, H, GATHERED)
    normed = x * tl.rsqrt(tl.sum(x * x) / H + eps) * norm.to(tl.float32)
    if P > 0:
        tl.store(residual + token.to(tl.int64) * H + offsets, x, inside)
    target = out + token.to(tl.int64) * H + offsets
    tl.store(target, normed.to(out.dtype.element_ty), inside)


def add_norm(
    residual_TH: Tensor,
    parts: Tensor | None,
    weight_RH: Tensor,
    slot_T: Tensor,
    eps: float,
    *,
    out_TH: Tensor,
    rows_TP: Tensor | None = None,
    shares_TP: Tensor | None = None,
) -> None:
    """Add parts to the residual, in place, and write its norm by each token's own variant.

    Args:
        residual_TH: float32.
        parts: [T, P, H] of any float dtype; None where there is nothing to add.
        weight_RH: norm weights of the resident slots; slot stride 0 where all share one.
        slot_T: int64.
        eps: added to the mean square.
        out_TH: the normed tokens, in the dtype of the products that read them.
        rows_TP: int64; if given, `parts` is [rows, H] and these are each token's.
        shares_TP: float32; what those are multiplied by.
    """
    num_tokens, hidden = residual_TH.shape
    gathered = rows_TP is not None
    num_parts = 0 if parts is None else parts.shape[1]
    if rows_TP is not None:
        num_parts = rows_TP.shape[1]
    nothing = residual_TH
    _add_norm_kernel[(num_tokens,)](
        residual_TH, nothing if parts is None else parts, nothing if rows_TP is None else rows_TP,
        nothing if shares_TP is None else shares_TP, weight_RH, slot_T, out_TH,
        weight_RH.stride(0), eps,
        P=num_parts, H=hidden, GATHERED=gathered, **_row(hidden), **chained(residual_TH.device),
    )  # fmt: skip


@triton.jit
def find_tile(counts, number, F: tl.constexpr, TOKENS: tl.constexpr):
    """The face, first place on its list and length of the list of tile `number`, faces in order.

    A program finds its work by itself: no list of tiles has to be made first.
    """
    faces = tl.arange(0, F)
    count_F = tl.load(counts + faces)
    tiles_F = (count_F + TOKENS - 1) // TOKENS
    face = tl.sum((tl.cumsum(tiles_F) <= number).to(tl.int32))
    before = tl.sum(tl.where(faces < face, tiles_F, 0))
    count = tl.sum(tl.where(faces == face, count_F, 0))
    return face, (number - before) * TOKENS, count


@triton.jit
def _router_rows(router, some, offsets, inside, E: tl.constexpr, H: tl.constexpr):
    """Those of some experts."""
    both = (some[:, None] < E) & inside[None, :]
    return tl.load(router + some[:, None] * H + offsets[None, :], both, other=0.0)


@triton.jit(
    do_not_specialize=("capacity",), do_not_specialize_on_alignment=("slot_T", "variant_T", "faces")
)
def _route_kernel(
    residual, parts, norm, router, slot_T, variant_T, faces, out,
    counts, pairs, weights,
    norm_stride, router_stride, faces_stride, capacity, eps,
    P: tl.constexpr, H: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr, K: tl.constexpr,
    K_POW2: tl.constexpr, AT_ONCE: tl.constexpr, ROW: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    slot, variant = tl.load(slot_T + token), tl.load(variant_T + token)
    router += slot * router_stride
    offsets = tl.arange(0, ROW)
    inside = offsets < H
    scale = tl.load(norm + slot * norm_stride + offsets, inside, other=0.0)
    first_AH = _router_rows(router, tl.arange(0, AT_ONCE), offsets, inside, E, H)
    begin_chained(CHAINED)
    x = _sum_parts(residual, parts, parts, parts, token, offsets, inside, P, H, False)
    scale = scale.to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x) / H + eps) * scale).to(out.dtype.element_ty)
    tl.store(residual + token * H + offsets, x, inside)
    tl.store(out + token * H + offsets, normed, inside)
    experts = tl.arange(0, E_POW2)
    logits_E = tl.full((E_POW2,), float("-inf"), tl.float32)
    for start in tl.static_range(0, E, AT_ONCE):
        some = start + tl.arange(0, AT_ONCE)
        rows_AH = first_AH
        if start > 0:
            rows_AH = _router_rows(router, some, offsets, inside, E, H)
        found_A = tl.sum(rows_AH.to(tl.float32) * normed.to(tl.float32)[None, :], axis=1)
        same_EA = experts[:, None] == some[None, :]
        mine_E = tl.sum(tl.where(same_EA, found_A[None, :], 0.0), axis=1)
        here_E = (experts >= start) & (experts < start + AT_ONCE) & (experts < E)
        logits_E = tl.where(here_E, mine_E, logits_E)
    largest = tl.max(logits_E)
    choices = tl.arange(0, K_POW2)
    chosen_K = tl.zeros((K_POW2,), tl.int32)
    weight_K = tl.zeros((K_POW2,), tl.float32)
    for rank in tl.static_range(K):
        best = tl.argmax(logits_E, axis=0)
        value = tl.exp(tl.max(logits_E) - largest)
        chosen_K = tl.where(choices == rank, best, chosen_K)
        weight_K = tl.where(choices == rank, value, weight_K)
        logits_E = tl.where(experts == best, float("-inf"), logits_E)
    real = choices < K
    tl.store(weights + token * K + choices, weight_K / tl.sum(weight_K), real)
    if variant >= 0:  # a row that only fills the batch up meets no expert
        face_K = tl.load(faces + variant * faces_stride + chosen_K, real, other=0).to(tl.int32)
        place_K = tl.atomic_add(counts + face_K, 1, real)
        tl.store(pairs + face_K * capacity + place_K, token * K + choices, real)


def route(
    residual_TH: Tensor,
    parts_TPH: Tensor,
    norm_RH: Tensor,
    router_REH: Tensor,
    slot_T: Tensor,
    variant_T: Tensor,
    faces_VE: Tensor,
    lists: FaceLists,
    layer: int,
    eps: float,
    *,
    out_TH: Tensor,
) -> None:
    """Add parts to the residual, write its norm, and put each token on its experts' lists.

    Mixtral's rule, as `models.moe.route` has it; the map to faces comes after the choice.

    Args:
        residual_TH: float32, changed in place.
        parts_TPH: float32, to be added first.
        norm_RH: norm weights of the resident slots.
        router_REH: routers of the resident slots.
        slot_T: int64 resident slots.
        variant_T: int64 rows of `faces_VE`; -1 where a row only fills the batch up.
        faces_VE: int64; variant, logical expert -> face of this layer.
        lists: receives the pairs of `layer` and all routing weights.
        layer: the layer's index.
        eps: added to the mean square.
        out_TH: the normed tokens.
    """
    num_tokens, hidden = residual_TH.shape
    num_experts, top_k = router_REH.shape[1], lists.weights_TK.shape[1]
    _route_kernel[(num_tokens,)](
        residual_TH, parts_TPH, norm_RH, router_REH, slot_T, variant_T, faces_VE, out_TH,
        lists.counts_LF[layer], lists.pairs_LFC[layer], lists.weights_TK,
        norm_RH.stride(0), router_REH.stride(0), faces_VE.stride(0), lists.pairs_LFC.shape[2], eps,
        P=parts_TPH.shape[1], H=hidden, E=num_experts,
        E_POW2=triton.next_power_of_2(num_experts), K=top_k,
        K_POW2=triton.next_power_of_2(top_k),
        AT_ONCE=min(EXPERTS_AT_ONCE, triton.next_power_of_2(num_experts)), **_row(hidden),
        **chained(residual_TH.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=("capacity", "first", "first_row"))
def _order_kernel(
    counts, pairs, ends, token_M, row_M, capacity, first, first_row,
    F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    face = first + tl.program_id(0)
    faces = tl.arange(0, F)
    count_F = tl.load(counts + faces)
    count = tl.sum(tl.where(faces == face, count_F, 0))
    start = tl.sum(tl.where((faces >= first) & (faces < face), count_F, 0))
    tl.store(ends + tl.program_id(0), start + count)
    for at in tl.range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        place = at + tl.arange(0, BLOCK)
        inside = place < count
        pair = tl.load(pairs + face.to(tl.int64) * capacity + place, inside, other=0)
        tl.store(token_M + start + place, (pair // K).to(tl.int64), inside)
        tl.store(row_M + pair, (first_row + start + place).to(tl.int64), inside)


def in_order(
    lists: FaceLists, layer: int, faces: range, *, first_row: int, row_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """The lists of some faces, one after another, as rows of a product over them.

    Args:
        lists: of a step.
        layer: the layer's index.
        faces: neighbours.
        first_row: the number of their first row.
        row_TK: int64; receives where each of their pairs is, and keeps the others.

    Returns:
        The end of each face's rows, int32 [F]; and the token of each, int64 [T * K], 0 past the
        last.
    """
    num_tokens, top_k = row_TK.shape
    ends_F = torch.empty(len(faces), dtype=torch.int32, device=row_TK.device)
    token_M = torch.zeros(num_tokens * top_k, dtype=torch.int64, device=row_TK.device)
    _order_kernel[(len(faces), triton.cdiv(num_tokens, 1024))](
        lists.counts_LF[layer], lists.pairs_LFC[layer], ends_F, token_M, row_TK,
        lists.pairs_LFC.shape[2], faces.start, first_row,
        F=lists.counts_LF.shape[1], K=top_k, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return ends_F, token_M


@triton.jit
def _gated_kernel(both, out, num, I: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num
    row, column = place // I, place % I
    gate = tl.load(both + row * 2 * I + column, inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * I + I + column, inside, other=0.0).to(tl.float32)
    tl.store(out + place, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), inside)


def gated(both_MI: Tensor) -> Tensor:
    """Silu of the first half of each row, times the second half."""
    out = both_MI.new_empty(both_MI.shape[0], both_MI.shape[1] // 2)
    _gated_kernel[(triton.cdiv(out.numel(), 4096),)](
        both_MI, out, out.numel(), I=out.shape[1], BLOCK=4096, num_warps=8
    )
    return out


def _row(hidden: int) -> dict[str, int]:
    """A program holds a whole row, and hides its latency behind many warps."""
    row = int(triton.next_power_of_2(hidden))
    return {"ROW": row, "num_warps": max(1, min(MAX_WARPS, row // 256))}

"""Triton kernels for attention over a paged key-value cache.

`decode_attention` takes sequences with one new token, cut into splits along the context so that a
small batch fills the device; the split that finishes last puts the others' results together in a
fixed order. `span_attention` takes those with more (flash attention, Dao 2023), and cuts a long
context in the same way where few programs would walk along it.

Legend: T tokens, Q query heads, KV key-value heads, D head dimension, B tokens of a cache block,
S splits, G query heads of a key-value head, N pieces of work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeruntime.kernels.attention_cuts import SPAN_TOKENS, DecodeScratch, SpanScratch
from moeruntime.kernels.chain import begin_chained, chained
from moeruntime.kernels.spans import Spans

__all__ = ["decode_attention", "rotate_and_store", "span_attention"]

ROTATED_HEADS = 16
"""Heads of a token that a program of `rotate_and_store` takes."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _turn(first, second, cos, sin):
    """Rotate halves by an angle; both halves, as they are stored."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit(do_not_specialize_on_alignment=("position_T", "row_T"))
def _rotate_kernel(
    qkv, position_T, row_T, cos, sin, query, keys, values,
    Q: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    begin_chained(CHAINED)
    token = tl.program_id(0)
    row = tl.load(row_T + token)
    if row < 0:
        return
    half = tl.arange(0, HALF)
    in_half = half < D // 2
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    half_in = in_half[None, :]
    inside = (head < Q + 2 * KV) & half_in
    at = head * D + half[None, :]
    source = qkv + token.to(tl.int64) * ((Q + 2 * KV) * D) + at
    first = tl.load(source, inside, other=0.0)
    second = tl.load(source + D // 2, inside, other=0.0)
    angle = tl.load(position_T + token) * (D // 2) + half
    c = tl.load(cos + angle, in_half, other=0.0)[None, :]
    s = tl.load(sin + angle, in_half, other=0.0)[None, :]
    turned, other = _turn(first.to(tl.float32), second.to(tl.float32), c, s)
    turned, other = turned.to(qkv.dtype.element_ty), other.to(qkv.dtype.element_ty)
    target = query + token.to(tl.int64) * (Q * D) + at
    is_query = (head < Q) & half_in
    tl.store(target, turned, is_query)
    tl.store(target + D // 2, other, is_query)
    target = keys + row * (KV * D) + at - Q * D
    is_key = (head >= Q) & (head < Q + KV) & half_in
    tl.store(target, turned, is_key)
    tl.store(target + D // 2, other, is_key)
    target = values + row * (KV * D) + at - (Q + KV) * D
    is_value = (head >= Q + KV) & inside
    tl.store(target, first, is_value)
    tl.store(target + D // 2, second, is_value)


def rotate_and_store(
    qkv_TC: Tensor,
    position_T: Tensor,
    row_T: Tensor,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    *,
    out_TQD: Tensor,
) -> None:
    """Rotate queries and keys, and write keys and values to the cache.

    Args:
        qkv_TC: queries, keys and values side by side, [T, (Q + 2 KV) * D].
        position_T: int64.
        row_T: int64 cache rows, block * B + row within it; -1 where a row only fills the step up.
        rotary: float32 cosines and sines [positions, D / 2].
        keys: cache [blocks, B, KV, D].
        values: the same for values.
        out_TQD: receives the rotated queries.
    """
    num_tokens, num_query, head_dim = out_TQD.shape
    num_kv = keys.shape[2]
    _rotate_kernel[(num_tokens, triton.cdiv(num_query + 2 * num_kv, ROTATED_HEADS))](
        qkv_TC, position_T, row_T, *rotary, out_TQD, keys, values,
        Q=num_query, KV=num_kv, D=head_dim, HALF=triton.next_power_of_2(head_dim // 2),
        HEADS=ROTATED_HEADS, num_warps=2, **chained(qkv_TC.device),
    )  # fmt: skip


@triton.jit
def _load_keys(
    tables, keys, values, at, high, kv, half, in_half, dims, in_dims,
    KV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Both halves of some cached keys, their values, and which of them there are."""
    where = at + tl.arange(0, STEP)
    inside = where < high
    block = tl.load(tables + where // BLOCK, inside, other=0)
    row = (block.to(tl.int64) * BLOCK + where % BLOCK) * KV + kv
    k_at = keys + row[None, :] * D + half[:, None]
    k_in = inside[None, :] & in_half[:, None]
    first, second = tl.load(k_at, k_in, other=0.0), tl.load(k_at + D // 2, k_in, other=0.0)
    v_at = values + row[:, None] * D + dims[None, :]
    return first, second, tl.load(v_at, inside[:, None] & in_dims[None, :], other=0.0), inside


@triton.jit
def _attend_keys(q_first, q_second, found, largest, total, acc, scale, PRECISION: tl.constexpr):
    """A decode's sums with what `_load_keys` found."""
    k_first, k_second, v, inside = found
    scores = tl.dot(q_first, k_first, input_precision=PRECISION)
    scores = tl.dot(q_second, k_second, scores, input_precision=PRECISION)
    scores = tl.where(inside[None, :], scores * (scale * LOG2_E), float("-inf"))
    peak = tl.maximum(largest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - peak[:, None])
    shrink = tl.exp2(largest - peak)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return peak, total, acc


@triton.jit(
    do_not_specialize=("table_stride", "totals_half"),
    do_not_specialize_on_alignment=("position_T", "table_T", "tables"),
)
def _decode_kernel(
    qkv, position_T, table_T, tables, cos, sin, keys, values, out,
    sums, totals, arrived, table_stride, totals_half, window, scale,
    Q: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr,
    G: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr,
    EARLY: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    token, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(table_T + token)
    if sequence < 0:
        begin_chained(CHAINED)
        return
    tables += sequence * table_stride
    position = tl.load(position_T + token).to(tl.int32)
    dtype = qkv.dtype.element_ty
    half, dims, heads = tl.arange(0, HALF), tl.arange(0, DIM), tl.arange(0, 16)
    in_half, in_dims, in_heads = half < D // 2, dims < D, heads < G
    cos_row = tl.load(cos + position * (D // 2) + half, in_half, other=0.0)
    sin_row = tl.load(sin + position * (D // 2) + half, in_half, other=0.0)
    begin = tl.maximum(0, position - window + 1)
    per_split = tl.cdiv(tl.cdiv(position - begin, SPLITS), STEP) * STEP
    low = begin + split * per_split
    high = tl.minimum(low + per_split, position)
    if EARLY:  # earlier steps wrote what is in the cache
        first_keys = _load_keys(
            tables, keys, values, low, high, kv, half, in_half, dims, in_dims, KV, D, BLOCK, STEP
        )
    begin_chained(CHAINED)
    qkv += token.to(tl.int64) * ((Q + 2 * KV) * D)
    q_at = qkv + (kv * G + heads)[:, None] * D + half[None, :]
    q_in = in_heads[:, None] & in_half[None, :]
    q_first, q_second = _turn(
        tl.load(q_at, q_in, other=0.0).to(tl.float32),
        tl.load(q_at + D // 2, q_in, other=0.0).to(tl.float32),
        cos_row[None, :],
        sin_row[None, :],
    )
    q_first, q_second = q_first.to(dtype), q_second.to(dtype)

    # The new token's own key and value are not in the cache yet: the last split brings them.
    largest = tl.full((16,), float("-inf"), tl.float32)
    total = tl.zeros((16,), tl.float32)
    acc = tl.zeros((16, DIM), tl.float32)
    rest = low
    if EARLY:
        if low < high:
            largest, total, acc = _attend_keys(
                q_first, q_second, first_keys, largest, total, acc, scale, PRECISION
            )
        rest += STEP
    for at in tl.range(rest, high, STEP):
        next_keys = _load_keys(
            tables, keys, values, at, high, kv, half, in_half, dims, in_dims, KV, D, BLOCK, STEP
        )
        largest, total, acc = _attend_keys(
            q_first, q_second, next_keys, largest, total, acc, scale, PRECISION
        )
    if split == SPLITS - 1:
        k_at = qkv + (Q + kv) * D + half
        k_first, k_second = _turn(
            tl.load(k_at, in_half, other=0.0).to(tl.float32),
            tl.load(k_at + D // 2, in_half, other=0.0).to(tl.float32),
            cos_row,
            sin_row,
        )
        k_first, k_second = k_first.to(dtype), k_second.to(dtype)
        v_own = tl.load(qkv + (Q + KV + kv) * D + dims, in_dims, other=0.0)
        block = tl.load(tables + position // BLOCK).to(tl.int64)
        row = (block * BLOCK + position % BLOCK) * KV + kv
        tl.store(keys + row * D + half, k_first, in_half)
        tl.store(keys + row * D + D // 2 + half, k_second, in_half)
        tl.store(values + row * D + dims, v_own, in_dims)
        own = tl.sum(q_first.to(tl.float32) * k_first.to(tl.float32)[None, :], axis=1)
        own += tl.sum(q_second.to(tl.float32) * k_second.to(tl.float32)[None, :], axis=1)
        own *= scale * LOG2_E
        peak = tl.maximum(largest, own)
        weight, shrink = tl.exp2(own - peak), tl.exp2(largest - peak)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * v_own.to(tl.float32)[None, :]
        largest = peak

    out_at = out + (token * Q + kv * G + heads)[:, None] * D + dims[None, :]
    out_in = in_heads[:, None] & in_dims[None, :]
    if SPLITS == 1:
        tl.store(out_at, (acc / total[:, None]).to(dtype), out_in)
    else:
        mine = (sequence * SPLITS + split) * Q + kv * G + heads
        tl.store(sums + mine[:, None] * D + dims[None, :], acc, out_in)
        tl.store(totals + mine, largest, in_heads)
        tl.store(totals + totals_half + mine, total, in_heads)
        tl.debug_barrier()
        if tl.atomic_add(arrived + sequence * KV + kv, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrived + sequence * KV + kv, 0)
            peak = tl.full((16,), float("-inf"), tl.float32)
            whole = tl.zeros((16,), tl.float32)
            mixed = tl.zeros((16, DIM), tl.float32)
            for one in tl.static_range(SPLITS):
                theirs = (sequence * SPLITS + one) * Q + kv * G + heads
                high_one = tl.load(totals + theirs, in_heads, other=0.0, cache_modifier=".cg")
                total_one = tl.load(
                    totals + totals_half + theirs, in_heads, other=1.0, cache_modifier=".cg"
                )
                sum_one = tl.load(
                    sums + theirs[:, None] * D + dims[None, :],
                    out_in,
                    other=0.0,
                    cache_modifier=".cg",
                )
                higher = tl.maximum(peak, high_one)
                # A split without tokens has no peak, and weighs nothing.
                keep = tl.where(peak > float("-inf"), tl.exp2(peak - higher), 0.0)
                add = tl.where(high_one > float("-inf"), tl.exp2(high_one - higher), 0.0)
                whole = whole * keep + total_one * add
                mixed = mixed * keep[:, None] + sum_one * add[:, None]
                peak = higher
            tl.store(out_at, (mixed / whole[:, None]).to(dtype), out_in)


def decode_attention(
    qkv_TC: Tensor,
    position_T: Tensor,
    table_T: Tensor,
    tables_SB: Tensor,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    scratch: DecodeScratch,
    sliding_window: int | None,
    *,
    out_TC: Tensor,
) -> None:
    """Rotate, store and attend: the only new token of each sequence over its cached ones.

    Args:
        qkv_TC: queries, keys and values side by side, [T, (Q + 2 KV) * D].
        position_T: int64; also how many tokens each sequence has in the cache.
        table_T: int64; which of the tables is that of the row's sequence, which has no other row;
            -1 where a row is left alone.
        tables_SB: int32 block tables, a row a sequence.
        rotary: float32 cosines and sines [positions, D / 2].
        keys: cache [blocks, B, KV, D]; the new tokens' keys are written to it.
        values: the same for values.
        scratch: for the splits.
        sliding_window: a token sees itself and the `sliding_window` - 1 tokens before it.
        out_TC: [T, Q * D].
    """
    num_tokens = qkv_TC.shape[0]
    block, num_kv, head_dim = keys.shape[1:]
    num_query = out_TC.shape[1] // head_dim
    assert num_query // num_kv <= 16
    cut, exact = scratch.cut, qkv_TC.dtype == torch.float32
    _decode_kernel[(num_tokens, num_kv, cut.splits)](
        qkv_TC, position_T, table_T, tables_SB, *rotary, keys, values, out_TC,
        scratch.sums, scratch.totals, scratch.arrived,
        tables_SB.stride(0), scratch.totals.stride(0), sliding_window or 2**30, head_dim**-0.5,
        Q=num_query, KV=num_kv, D=head_dim, HALF=max(16, triton.next_power_of_2(head_dim // 2)),
        DIM=max(16, triton.next_power_of_2(head_dim)), G=num_query // num_kv, BLOCK=block,
        STEP=min(cut.keys, 64) if exact else cut.keys,
        SPLITS=cut.splits, EARLY=cut.early, PRECISION="ieee" if exact else "tf32",
        num_warps=cut.warps, num_stages=1 if exact else cut.stages, **chained(qkv_TC.device),
    )  # fmt: skip


@triton.jit(
    do_not_specialize=("table_stride", "totals_half"),
    do_not_specialize_on_alignment=("pieces", "starts", "stops", "contexts", "tables"),
)
def _span_kernel(
    query, keys, values, out, pieces, starts, stops, contexts, tables, sums, totals, arrived,
    table_stride, totals_half, window, scale,
    Q: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    piece = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest of a prompt are last
    pieces += 4 * piece
    span = tl.load(pieces)
    first_row, split, splits = tl.load(pieces + 1), tl.load(pieces + 2), tl.load(pieces + 3)
    begin_chained(CHAINED)
    if span < 0:
        return
    # Query heads that share keys are rows beside each other.
    ROWS: tl.constexpr = TOKENS * HEADS
    runs: tl.constexpr = (G + HEADS - 1) // HEADS
    kv = tl.program_id(0) // runs
    of_kv = tl.program_id(0) % runs * HEADS + tl.arange(0, ROWS) % HEADS
    start, stop = tl.load(starts + span), tl.load(stops + span)
    context = tl.load(contexts + span)
    dtype = query.dtype.element_ty
    row, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    token = first_row + row // HEADS
    rows_in, in_dims = ((start + token < stop) & (of_kv < G))[:, None], dims < D
    first_place = context - (stop - start) + first_row
    place = first_place + row // HEADS
    at_row = (start + token).to(tl.int64) * Q + kv * G + of_kv
    q = tl.load(query + at_row[:, None] * D + dims[None, :], rows_in & in_dims[None, :], other=0.0)
    low = tl.maximum(0, first_place - window + 1) // STEP * STEP
    high = tl.minimum(first_place + TOKENS, context)
    per_split = tl.cdiv(tl.cdiv(high - low, splits), STEP) * STEP
    low += split * per_split
    high = tl.minimum(low + per_split, high)
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for at in tl.range(low, high, STEP):
        where = at + tl.arange(0, STEP)
        inside = where < high
        block = tl.load(tables + span * table_stride + where // BLOCK, inside, other=0)
        cached = (block.to(tl.int64) * BLOCK + where % BLOCK) * KV + kv
        k = tl.load(
            keys + cached[None, :] * D + dims[:, None],
            inside[None, :] & in_dims[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2_E)
        seen = (where[None, :] <= place[:, None]) & (where[None, :] > place[:, None] - window)
        scores = tl.where(seen & inside[None, :], scores, float("-inf"))
        peak = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - peak[:, None])
        shrink = tl.exp2(largest - peak)
        v = tl.load(
            values + cached[:, None] * D + dims[None, :],
            inside[:, None] & in_dims[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        largest = peak
    target = out + at_row[:, None] * D + dims[None, :]
    target_in = rows_in & in_dims[None, :]
    if splits == 1:
        tl.store(target, (acc / total[:, None]).to(dtype), target_in)
    else:
        mine = piece * tl.num_programs(0) + tl.program_id(0)
        first = (piece - split) * tl.num_programs(0) + tl.program_id(0)
        of_sums = row[:, None] * D + dims[None, :]
        tl.store(sums + mine * ROWS * D + of_sums, acc, target_in)
        tl.store(totals + mine * ROWS + row, largest)
        tl.store(totals + totals_half + mine * ROWS + row, total)
        tl.debug_barrier()
        if tl.atomic_add(arrived + first, 1, sem="acq_rel") == splits - 1:
            tl.store(arrived + first, 0)
            peak = tl.full((ROWS,), -1e30, tl.float32)
            whole = tl.zeros((ROWS,), tl.float32)
            mixed = tl.zeros((ROWS, DIM), tl.float32)
            for one in tl.range(splits):
                theirs = first + one * tl.num_programs(0)
                at_total = totals + theirs * ROWS + row
                high_one = tl.load(at_total, cache_modifier=".cg")
                total_one = tl.load(at_total + totals_half, cache_modifier=".cg")
                sum_one = tl.load(
                    sums + theirs * ROWS * D + of_sums, target_in, other=0.0, cache_modifier=".cg"
                )
                higher = tl.maximum(peak, high_one)
                keep, add = tl.exp2(peak - higher), tl.exp2(high_one - higher)
                whole = whole * keep + total_one * add
                mixed = mixed * keep[:, None] + sum_one * add[:, None]
                peak = higher
            tl.store(target, (mixed / whole[:, None]).to(dtype), target_in)


def span_attention(
    query_TQD: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: Spans,
    pieces_N4: Tensor,
    scratch: SpanScratch,
    *,
    out_TQD: Tensor,
) -> None:
    """Causal attention of each sequence's new tokens over its cached ones, which include them.

    Args:
        query_TQD: rotated queries.
        keys: cache [blocks, B, KV, D].
        values: the same for values.
        spans: the sequences.
        pieces_N4: int32, what the cut of `scratch` makes of them; a sequence of -1 is none. Tokens
            that are in none are left alone.
        scratch: for the splits; its cut is of the model that the queries are of.
        out_TQD: in the query's dtype; may be the queries themselves, each of which is read by all
            that have a split of what it sees before one writes in its place.
    """
    num_query, head_dim = query_TQD.shape[1:]
    block, num_kv = keys.shape[1:3]
    cut = scratch.cut
    exact = query_TQD.dtype == torch.float32
    _span_kernel[(cut.programs, len(pieces_N4))](
        query_TQD, keys, values, out_TQD, pieces_N4, *spans.rows_3S, spans.tables_SB,
        *scratch.tensors(), spans.tables_SB.stride(0), scratch.totals.stride(0),
        cut.window or 2**30, head_dim**-0.5,
        Q=num_query, KV=num_kv, D=head_dim, DIM=max(16, triton.next_power_of_2(head_dim)),
        G=num_query // num_kv, BLOCK=block, TOKENS=SPAN_TOKENS, HEADS=cut.heads,
        STEP=32 if exact else 64, PRECISION="ieee" if exact else "tf32", num_warps=8,
        num_stages=1 if exact else 3, **chained(query_TQD.device),
    )  # fmt: skip

"""Attention over a paged cache, against the reference kernel in float32 and rotation in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_fixtures import DTYPES, assert_close, randn
from moeruntime.kernels import attention, attention_cuts, paged_attention
from moeruntime.kernels.attention_cuts import (
    SPAN_TOKENS,
    DecodeCut,
    DecodeScratch,
    SpanCut,
    SpanScratch,
)
from moeruntime.kernels.spans import Spans, to_device
from moeruntime.kv_cache import BLOCK_TOKENS, blocks_for

Heads = tuple[int, int, int]
# Query heads, key-value heads, dimension.
PAIRS, ODD, EQUAL = (4, 2, 32), (3, 1, 20), (2, 2, 16)
HEADS: list[Heads] = [PAIRS, ODD, EQUAL]
EXACT, ROUNDED = DTYPES


def rotary(dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For positions up to 400; any angles will do."""
    angle = randn(400, dim // 2, seed=1, device=device)
    return angle.cos(), angle.sin()


def rotated(x_TND: Tensor, position_T: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (one.double()[position_T][:, None] for one in angles)
    first, second = x_TND.double().chunk(2, dim=-1)
    both = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return both.to(x_TND.dtype)


def block_tables(contexts: list[int], spare: int) -> list[list[int]]:
    """Blocks of each sequence, in no order; `spare` are nobody's."""
    counts = [blocks_for(context) for context in contexts]
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randperm(sum(counts) + spare, generator=generator).tolist()
    return [[blocks.pop() for _ in range(count)] for count in counts]


def rows_of(table: list[int], places: range) -> list[int]:
    return [table[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS for at in places]


def filled_cache(
    tables: list[list[int]],
    cached: list[int],
    heads: Heads,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Keys and values of what is cached; everything else is poisoned."""
    num_blocks = 1 + max(max(table, default=0) for table in tables)
    caches = []
    for seed in (3, 4):
        cache = torch.full((num_blocks, BLOCK_TOKENS, *heads[1:]), torch.nan)
        flat = cache.view(-1, *heads[1:])
        for table, count in zip(tables, cached, strict=True):
            rows = rows_of(table, range(count))
            flat[rows] = torch.randn(
                count, *heads[1:], generator=torch.Generator().manual_seed(seed)
            )
        caches.append(cache.to(device, dtype))
    return caches[0], caches[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_queries_and_keys_are_rotated_and_the_cache_filled(
    device: torch.device, heads: Heads, dtype: torch.dtype
) -> None:
    query, kv, dim = heads
    position_T = torch.tensor([0, 1, 17, 399], device=device)
    row_T = torch.tensor([5, 33, -1, 0], device=device)  # the third only fills the step up
    qkv = randn(4, (query + 2 * kv) * dim, seed=5, device=device, dtype=dtype)
    keys = torch.full((3, BLOCK_TOKENS, kv, dim), torch.nan, dtype=dtype, device=device)
    values, expected_keys, expected_values = (keys.clone() for _ in range(3))
    out = torch.full((4, query, dim), torch.nan, dtype=dtype, device=device)
    angles = rotary(dim, device)
    attention.rotate_and_store(qkv, position_T, row_T, angles, keys, values, out_TQD=out)
    q, k, v = qkv.view(4, -1, dim).split([query, kv, kv], dim=1)
    real = [0, 1, 3]
    expected_keys.view(-1, kv, dim)[row_T[real]] = rotated(k, position_T, angles)[real]
    expected_values.view(-1, kv, dim)[row_T[real]] = v[real]
    expected = torch.full_like(out, torch.nan)
    expected[real] = rotated(q, position_T, angles)[real]
    assert_close(out, expected, dtype)
    assert_close(keys, expected_keys, dtype)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("heads", "window", "cut", "dtype"),
    [
        (PAIRS, None, DecodeCut(1), EXACT),
        (PAIRS, None, DecodeCut(3), EXACT),
        (PAIRS, None, DecodeCut(3, keys=32, warps=1, stages=3, early=False), EXACT),
        (PAIRS, 1, DecodeCut(3), EXACT),
        (PAIRS, 40, DecodeCut(1), EXACT),
        (PAIRS, 150, DecodeCut(3), EXACT),
        (ODD, 150, DecodeCut(4), EXACT),
        (EQUAL, None, DecodeCut(2), EXACT),
        (PAIRS, None, DecodeCut(3), ROUNDED),
        (ODD, 40, DecodeCut(1, keys=64, warps=2), ROUNDED),
        (ODD, 40, DecodeCut(1, keys=32, warps=1, stages=3, early=False), ROUNDED),
    ],
)
def test_a_new_token_sees_itself_and_what_is_cached(
    device: torch.device, heads: Heads, window: int | None, cut: DecodeCut, dtype: torch.dtype
) -> None:
    query, kv, dim = heads
    cached = [0, 15, 300, 16, 131]  # the fourth row only fills the batch up
    table_of = [1, 0, 2, -1, 4]
    tables = block_tables([count + 1 for count in cached], spare=2)
    real = [0, 1, 2, 4]
    keys, values = filled_cache(
        [tables[row] for row in real], [cached[row] for row in real], heads, device, dtype
    )
    tables[3] = tables[2]  # of another sequence, which must not be written to
    width = max(len(table) for table in tables)
    by_sequence = [tables[idx] for idx in (1, 0, 2, 3, 4)]
    tables_SB = torch.tensor(
        [[*table, *[0] * (width - len(table))] for table in by_sequence], dtype=torch.int32
    ).to(device)
    position_T = torch.tensor(cached, device=device)
    scratch = DecodeScratch(cut, len(cached), query, kv, dim, device)
    scratch.sums.fill_(torch.nan)
    scratch.totals.fill_(torch.nan)
    angles = rotary(dim, device)
    for seed in (6, 7):  # twice: counters of splits have to be where they were
        qkv = randn(len(cached), (query + 2 * kv) * dim, seed=seed, device=device, dtype=dtype)
        q, k, v = qkv.view(len(cached), -1, dim).split([query, kv, kv], dim=1)
        expected_keys, expected_values = keys.clone(), values.clone()
        rows = [rows_of(tables[row], range(cached[row], cached[row] + 1))[0] for row in real]
        expected_keys.view(-1, kv, dim)[rows] = rotated(k, position_T, angles)[real]
        expected_values.view(-1, kv, dim)[rows] = v[real]
        expected = torch.full((len(cached), query * dim), torch.nan)
        expected[real] = paged_attention(
            rotated(q, position_T, angles)[real].float().cpu(),
            expected_keys.float().cpu(),
            expected_values.float().cpu(),
            [(idx, idx + 1, cached[row] + 1) for idx, row in enumerate(real)],
            [torch.tensor(tables[row]) for row in real],
            window,
        )
        out = torch.full((len(cached), query * dim), torch.nan, dtype=dtype, device=device)
        attention.decode_attention(
            qkv,
            position_T,
            torch.tensor(table_of, device=device),
            tables_SB,
            angles,
            keys,
            values,
            scratch,
            window,
            out_TC=out,
        )
        assert_close(out, expected, dtype)
        assert_close(keys, expected_keys, dtype)
        torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)
        assert not scratch.arrived.any()


@pytest.mark.parametrize(
    ("heads", "window", "split_keys", "dtype"),
    [
        (PAIRS, None, 512, EXACT),
        (PAIRS, 1, 512, EXACT),
        (PAIRS, 40, 512, EXACT),
        (ODD, 150, 512, EXACT),
        (PAIRS, None, 40, EXACT),
        (PAIRS, None, 8, EXACT),  # some splits have nothing
        (ODD, 150, 40, EXACT),
        (EQUAL, 40, 20, EXACT),
        (PAIRS, None, 512, ROUNDED),
        (EQUAL, 40, 512, ROUNDED),
        (PAIRS, None, 40, ROUNDED),
    ],
)
def test_new_tokens_of_prompts_see_what_lies_before_them(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    heads: Heads,
    window: int | None,
    split_keys: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(attention_cuts, "SPLIT_KEYS", split_keys)
    query, kv, dim = heads
    counts = [SPAN_TOKENS + 7, 1, 1, 9]
    contexts = [SPAN_TOKENS + 7, 1, 100, 160]
    tables = block_tables(contexts, spare=2)
    ends = [sum(counts[: idx + 1]) for idx in range(len(counts))]
    spans = [
        (end - count, end, context)
        for end, count, context in zip(ends, counts, contexts, strict=True)
    ]
    cut = SpanCut.of(query, kv, window)
    pieces = cut.pieces(spans)
    assert (max(splits for *_, splits in pieces) > 1) == (split_keys < 512)
    pieces_N4 = to_device(torch.tensor([*pieces, (-1, 0, 0, 1)], dtype=torch.int32), device)
    on_device = Spans.build(spans, tables, device)
    scratch = SpanScratch(cut, dim, device)
    scratch.sums.fill_(torch.nan)
    scratch.totals.fill_(torch.nan)
    keys, values = filled_cache(tables, contexts, heads, device, dtype)
    alone = [start for start, stop, _ in spans if stop - start == 1]
    for seed in (8, 9):  # twice: counters of splits have to be where they were
        q = randn(ends[-1], query, dim, seed=seed, device=device, dtype=dtype)
        expected = paged_attention(
            q.float().cpu(),
            keys.float().cpu(),
            values.float().cpu(),
            spans,
            [torch.tensor(table) for table in tables],
            window,
        )
        expected[alone] = q[alone].flatten(1).float().cpu()  # their kernel is another
        attention.span_attention(q, keys, values, on_device, pieces_N4, scratch, out_TQD=q)
        assert_close(q.flatten(1), expected, dtype)
        assert not scratch.arrived.any()

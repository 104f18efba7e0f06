"""Each reference kernel against a loop over tokens, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moeruntime.kernels import (
    TokenGroup,
    expert_mlp,
    grouped_linear,
    paged_attention,
    write_cache,
)
from moeruntime.kv_cache import BLOCK_TOKENS
from moeruntime.models.experts import DensePool

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)
Array = NDArray[np.float64]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def f64(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def assert_close(actual: torch.Tensor, expected: Array, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert np.abs(f64(actual) - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


# -- grouped_linear ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "groups",
    [
        [TokenGroup(0, 0, 9)],
        [TokenGroup(2, 0, 9)],
        [TokenGroup(2, 0, 1), TokenGroup(0, 1, 6), TokenGroup(1, 6, 9)],
        [TokenGroup(1, 0, 4), TokenGroup(2, 4, 9)],
    ],
)
def test_each_token_meets_its_own_variants_weights(
    groups: list[TokenGroup], dtype: torch.dtype
) -> None:
    x_TI, weight_ROI = randn(9, 7, seed=1, dtype=dtype), randn(3, 5, 7, seed=2, dtype=dtype)
    expected = np.zeros((9, 5))
    for slot, start, stop in groups:
        for token in range(start, stop):
            expected[token] = f64(weight_ROI[slot]) @ f64(x_TI[token])
    assert_close(grouped_linear(x_TI, weight_ROI, groups), expected, dtype)


def test_weights_that_all_variants_share_are_one_product() -> None:
    x_TI, weight_OI = randn(6, 7, seed=3), randn(5, 7, seed=4)
    groups = [TokenGroup(1, 0, 2), TokenGroup(0, 2, 6)]
    out = grouped_linear(x_TI, weight_OI.expand(2, 5, 7), groups)
    assert_close(out, f64(x_TI) @ f64(weight_OI).T, torch.float32)


# -- expert_mlp ----------------------------------------------------------------------------------


def naive_experts(
    x_TH: torch.Tensor,
    slots_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_SIH: torch.Tensor,
    down_SHI: torch.Tensor,
) -> Array:
    x, gate_up, down = f64(x_TH), f64(gate_up_SIH), f64(down_SHI)
    inner = down.shape[2]
    out = np.zeros_like(x)
    for token in range(len(x)):
        for slot, weight in zip(slots_TK[token].tolist(), weights_TK[token].tolist(), strict=True):
            gate, up = gate_up[slot, :inner] @ x[token], gate_up[slot, inner:] @ x[token]
            out[token] += weight * (down[slot] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_slots"), [(1, 2, 4), (17, 2, 6), (17, 1, 3), (40, 3, 3), (3, 2, 9)]
)
def test_experts_are_applied_and_weighed_per_token(
    num_tokens: int, top_k: int, num_slots: int, dtype: torch.dtype
) -> None:
    seed = num_tokens * 100 + top_k
    x_TH = randn(num_tokens, 12, seed=seed, dtype=dtype)
    gate_up = randn(num_slots, 20, 12, seed=seed + 1, dtype=dtype)
    down = randn(num_slots, 12, 10, seed=seed + 2, dtype=dtype)
    scores = randn(num_tokens, num_slots, seed=seed + 3)
    weights_TK, slots_TK = scores.softmax(-1).topk(top_k)
    actual = expert_mlp(x_TH, slots_TK, weights_TK, DensePool(gate_up, down))
    assert_close(actual, naive_experts(x_TH, slots_TK, weights_TK, gate_up, down), dtype)


def test_two_choices_of_one_token_may_share_a_slot() -> None:
    x_TH, gate_up, down = randn(5, 12, seed=1), randn(2, 20, 12, seed=2), randn(2, 12, 10, seed=3)
    slots_TK = torch.tensor([[1, 1], [0, 0], [0, 1], [1, 0], [1, 1]])
    weights_TK = torch.rand(5, 2, generator=torch.Generator().manual_seed(4))
    actual = expert_mlp(x_TH, slots_TK, weights_TK, DensePool(gate_up, down))
    expected = naive_experts(x_TH, slots_TK, weights_TK, gate_up, down)
    assert_close(actual, expected, torch.float32)


# -- write_cache and paged_attention -------------------------------------------------------------


def test_write_cache_touches_the_named_rows_only() -> None:
    cache = torch.zeros(4, BLOCK_TOKENS, 2, 3)
    new = randn(3, 2, 3, seed=1)
    rows = [0, BLOCK_TOKENS - 1, 3 * BLOCK_TOKENS + 5]
    write_cache(cache, torch.tensor(rows), new)
    assert torch.equal(cache[0, 0], new[0])
    assert torch.equal(cache[0, BLOCK_TOKENS - 1], new[1])
    assert torch.equal(cache[3, 5], new[2])
    assert int(cache.count_nonzero()) == new.numel()


def naive_attention(
    query_QD: Array, keys_CKD: Array, values_CKD: Array, position: int, window: int | None
) -> Array:
    """One token at `position` over all it may see."""
    num_heads, head_dim = query_QD.shape
    per_kv = num_heads // keys_CKD.shape[1]
    first = 0 if window is None else max(0, position - window + 1)
    out = np.zeros_like(query_QD)
    for head in range(num_heads):
        kv = head // per_kv
        scores = [
            float(query_QD[head] @ keys_CKD[at, kv]) / math.sqrt(head_dim)
            for at in range(first, position + 1)
        ]
        weights = np.exp(np.array(scores) - max(scores))
        weights /= weights.sum()
        for weight, at in zip(weights, range(first, position + 1), strict=True):
            out[head] += weight * values_CKD[at, kv]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 2, 5, 16, 1000])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (4, 4), (4, 1)])
def test_attention_over_scattered_blocks(
    num_heads: int, num_kv_heads: int, window: int | None, dtype: torch.dtype
) -> None:
    head_dim, num_blocks = 8, 12
    keys = randn(num_blocks, BLOCK_TOKENS, num_kv_heads, head_dim, seed=1, dtype=dtype)
    values = randn(num_blocks, BLOCK_TOKENS, num_kv_heads, head_dim, seed=2, dtype=dtype)
    # (new tokens, context): whole prompts, a chunk, decodes, a block's borders.
    lengths = [(5, 5), (1, 1), (7, 40), (1, 33), (1, 16), (17, 17)]
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).tolist()
    spans, tables, start = [], [], 0
    for num_new, context in lengths:
        spans.append((start, start + num_new, context))
        start += num_new
        count = -(-context // BLOCK_TOKENS)
        tables.append(torch.tensor([order.pop() for _ in range(count)]))
    query = randn(start, num_heads, head_dim, seed=4, dtype=dtype)
    expected = np.zeros((start, num_heads, head_dim))
    for (first, stop, context), table in zip(spans, tables, strict=True):
        key = f64(keys)[table.numpy()].reshape(-1, num_kv_heads, head_dim)
        value = f64(values)[table.numpy()].reshape(-1, num_kv_heads, head_dim)
        for row in range(first, stop):
            position = context - (stop - row)
            expected[row] = naive_attention(f64(query)[row], key, value, position, window)
    actual = paged_attention(query, keys, values, spans, tables, window)
    assert_close(actual, expected.reshape(start, -1), dtype)


@pytest.mark.parametrize("window", [None, 4])
def test_attention_ignores_what_lies_behind_the_context(window: int | None) -> None:
    keys, values = randn(2, BLOCK_TOKENS, 1, 4, seed=1), randn(2, BLOCK_TOKENS, 1, 4, seed=2)
    query, table = randn(3, 2, 4, seed=3), torch.tensor([1, 0])
    before = paged_attention(query, keys, values, [(0, 3, 20)], [table], window)
    # Context 20: block 1 whole, and 4 rows of block 0. What nobody wrote yet may be anything.
    keys[0, 4:] = math.nan
    values[0, 4:] = math.inf
    after = paged_attention(query, keys, values, [(0, 3, 20)], [table], window)
    assert torch.equal(before, after)

from __future__ import annotations

import random

import pytest
import torch

from helpers import TINY_CONFIG
from moeruntime.errors import CheckpointError
from moeruntime.families import FAMILIES
from moeruntime.kv_cache import BLOCK_TOKENS, BlockPool, KVCache, blocks_for
from moeruntime.strict_json import Fields

CONFIG = FAMILIES["mixtral"].parse_config(Fields(TINY_CONFIG, "config.json", CheckpointError))


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"),
    [(0, 0), (1, 1), (BLOCK_TOKENS, 1), (BLOCK_TOKENS + 1, 2), (10 * BLOCK_TOKENS, 10)],
)
def test_blocks_for_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert blocks_for(num_tokens) == num_blocks


def test_allocate_takes_all_or_nothing() -> None:
    pool = BlockPool(3)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    first = pool.allocate(2)
    assert first is not None
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    assert pool.allocate(0) == []


def test_no_block_has_two_owners_and_none_is_lost() -> None:
    rng = random.Random(0)
    pool = BlockPool(40)
    owned: list[list[int]] = []
    for _ in range(3000):
        if owned and rng.random() < 0.5:
            pool.free(owned.pop(rng.randrange(len(owned))))
        else:
            blocks = pool.allocate(rng.randint(0, 12))
            if blocks is not None:
                owned.append(blocks)
        taken = [block for blocks in owned for block in blocks]
        assert len(set(taken)) == len(taken)
        assert all(0 <= block < 40 for block in taken)
        assert pool.num_free == 40 - len(taken)


def test_freeing_more_than_there_is_fails() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError):
        pool.free([0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_bytes_is_what_a_block_takes(dtype: torch.dtype) -> None:
    cache = KVCache(CONFIG, 5, dtype, torch.device("cpu"))
    assert cache.keys[0].shape == (5, BLOCK_TOKENS, CONFIG.num_kv_heads, CONFIG.head_dim)
    tensors = [*cache.keys, *cache.values]
    assert len(tensors) == 2 * CONFIG.num_layers
    assert sum(tensor.nbytes for tensor in tensors) == 5 * KVCache.block_bytes(CONFIG, dtype)

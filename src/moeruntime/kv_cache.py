"""The key-value cache in fixed blocks: who owns which block, and the tensors behind them.

A sequence's cache is a list of block numbers, its block table; token `i` lives in block
`table[i // BLOCK_TOKENS]` at row `i % BLOCK_TOKENS`. Blocks are interchangeable, so nothing
fragments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeruntime.families import ModelConfig

__all__ = ["BLOCK_TOKENS", "BlockPool", "KVCache", "blocks_for"]

BLOCK_TOKENS = 16


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


class BlockPool:
    """The free list. Pure Python: the scheduler is tested with it and no model."""

    def __init__(self, num_blocks: int) -> None:
        """All blocks start free."""
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, or None, taking nothing, when there are fewer."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def free(self, blocks: list[int]) -> None:
        """Give blocks back."""
        self._free.extend(reversed(blocks))
        assert len(self._free) <= self.num_blocks


class KVCache:
    """Keys and values of every layer: `keys[layer]` and `values[layer]`, [blocks, B, KV, D].

    B is BLOCK_TOKENS, KV the key-value heads, D the head dimension.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate `num_blocks` blocks for each layer."""
        shape = (num_blocks, BLOCK_TOKENS, config.num_kv_heads, config.head_dim)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for _ in range(config.num_layers):
            self.keys.append(torch.empty(shape, dtype=dtype, device=device))
            self.values.append(torch.empty(shape, dtype=dtype, device=device))

    @staticmethod
    def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return BLOCK_TOKENS * per_token * dtype.itemsize

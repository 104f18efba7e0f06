"""The key-value cache in fixed blocks: who owns which block, and the tensors behind them.

A sequence's cache is a list of block numbers, its block table; token `i` lives in block
`table[i // BLOCK_TOKENS]` at row `i % BLOCK_TOKENS`. Blocks are interchangeable, so nothing
fragments.

Keys and values depend on the variant and on all tokens up to their own. So a full block is known by
a chain: the variant, and the tokens of every block up to it. Sequences of one variant that begin
alike share such blocks; those that nobody owns stay until their room is wanted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from moeruntime.families import ModelConfig

__all__ = ["BLOCK_TOKENS", "BlockPool", "KVCache", "blocks_for"]

BLOCK_TOKENS = 16


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


ChainLink = str | int
"""What a block comes after: the variant's name before the first block, then each block's number in
the order of publication. Numbers are never used twice, so a chain names exactly one text."""


class BlockPool:
    """Who owns which block, and which blocks can be shared.

    Pure Python: the scheduler is tested with it and no model.
    """

    def __init__(self, num_blocks: int) -> None:
        """All blocks start free."""
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_owners = [0] * num_blocks
        # (what comes before, tokens) -> (link, block) of a published block, and the way back.
        self._published: dict[tuple[ChainLink, tuple[int, ...]], tuple[int, int]] = {}
        self._key_of: dict[int, tuple[ChainLink, tuple[int, ...]]] = {}
        # Published blocks that nobody owns, least recently used first.
        self._unowned: OrderedDict[int, None] = OrderedDict()
        self._next_link = 0

    @property
    def num_free(self) -> int:
        """Blocks nobody owns; some of them may still be found by their text."""
        return len(self._free) + len(self._unowned)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks of unknown contents, or None, taking nothing, when there are fewer.

        Published blocks that nobody owns are given up for it, least recently used first.
        """
        if count > self.num_free:
            return None
        while len(self._free) < count:
            block, _ = self._unowned.popitem(last=False)
            del self._published[self._key_of.pop(block)]
            self._free.append(block)
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._num_owners[block] = 1
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give up one ownership of each block of a table."""
        # The last first: without its predecessors a block is not found.
        for block in reversed(blocks):
            self._num_owners[block] -= 1
            assert self._num_owners[block] >= 0, f"block {block} has no owner"
            if self._num_owners[block]:
                continue
            if block in self._key_of:
                self._unowned[block] = None
            else:
                self._free.append(block)

    def share(self, variant: str, tokens: Sequence[int]) -> tuple[list[int], ChainLink]:
        """Become an owner of the published blocks that hold the beginning of a text.

        Args:
            variant: whose keys and values.
            tokens: the text; only whole blocks of it are looked for.

        Returns:
            The longest run of blocks from its start, and what the next block would come after.
        """
        blocks: list[int] = []
        link: ChainLink = variant
        for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            found = self._published.get((link, tuple(tokens[start : start + BLOCK_TOKENS])))
            if found is None:
                break
            link, block = found
            self._num_owners[block] += 1
            self._unowned.pop(block, None)
            blocks.append(block)
        return blocks, link

    def publish(self, after: ChainLink, tokens: Sequence[int], block: int) -> ChainLink:
        """Let others find an owned block, which from now on must not be written.

        If its text is published already, that block stays and this one remains its owner's alone.

        Args:
            after: what `share` or `publish` returned for the text before it.
            tokens: the BLOCK_TOKENS tokens it holds.
            block: its number.

        Returns:
            What the next block comes after.
        """
        assert len(tokens) == BLOCK_TOKENS and self._num_owners[block] > 0
        key = (after, tuple(tokens))
        if key in self._published:
            return self._published[key][0]
        link = self._next_link
        self._next_link += 1
        self._published[key] = (link, block)
        self._key_of[block] = key
        return link


class KVCache:
    """Keys and values of every cached block: `keys[number]`, `values[number]`, [blocks, B, KV, D].

    B is BLOCK_TOKENS, KV the key-value heads, D the head dimension.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate `num_blocks` blocks for each layer."""
        shape = (num_blocks, BLOCK_TOKENS, config.num_kv_heads, config.head_dim)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for _ in range(config.num_cached_blocks):
            self.keys.append(torch.empty(shape, dtype=dtype, device=device))
            self.values.append(torch.empty(shape, dtype=dtype, device=device))

    @staticmethod
    def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        per_token = 2 * config.num_cached_blocks * config.num_kv_heads * config.head_dim
        return BLOCK_TOKENS * per_token * dtype.itemsize

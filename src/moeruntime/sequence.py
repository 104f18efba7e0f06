"""A request on its way through the engine."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from moeruntime.kv_cache import ChainLink, blocks_for
from moeruntime.request import FinishReason, SamplingParams

__all__ = ["Sequence"]


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens so far, how many of them the cache holds, and what the sequence owns.

    Attributes:
        request_id: the caller's handle.
        variant: whose weights it needs.
        prompt_ids: the prompt's tokens; of an encoder-decoder, what its decoder begins with.
        source_ids: of an encoder-decoder, the prompt's tokens, which its encoder reads.
        sampling: how to go on; its max_tokens already fits the context.
        output_ids: tokens chosen so far.
        num_cached: tokens whose keys and values are in the cache.
        block_table: its cache blocks, those of its source first; empty while it waits.
        num_published: its first blocks that others can find, or that it found itself.
        chain: what the block after them comes after (see `BlockPool.publish`).
        holds_slot: whether it holds its variant's resident slot, as all that run do.
        times_passed: requests that were admitted before this one although they came later.
        finish_reason: None while it is alive.
    """

    request_id: int
    variant: str
    prompt_ids: Items[int]
    sampling: SamplingParams
    source_ids: Items[int] = ()
    output_ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    block_table: list[int] = field(default_factory=list)
    num_published: int = 0
    chain: ChainLink = field(init=False)
    holds_slot: bool = False
    times_passed: int = 0
    finish_reason: FinishReason | None = None
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        """Seed the sequence's own random numbers."""
        self.chain = self.variant
        self._random = random.Random(self.sampling.seed)

    @property
    def num_pending(self) -> int:
        """Tokens to run before the next one can be chosen: the rest of the prompt, or one."""
        return len(self.prompt_ids) + len(self.output_ids) - self.num_cached

    @property
    def num_unread(self) -> int:
        """Tokens of the source, until the encoder has read it with the first of the others."""
        return 0 if self.num_cached else len(self.source_ids)

    @property
    def num_source_blocks(self) -> int:
        """Blocks of what the encoder makes of the source."""
        return blocks_for(len(self.source_ids))

    @property
    def num_blocks_needed(self) -> int:
        """Blocks for source and prompt and every token it may generate.

        The last token chosen is never run, so it needs no row.
        """
        num_own = len(self.prompt_ids) + self.sampling.max_tokens - 1
        return self.num_source_blocks + blocks_for(num_own)

    def pending_ids(self, count: int) -> list[int]:
        """The next `count` tokens to run."""
        return self.ids(self.num_cached, self.num_cached + count)

    def ids(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and output."""
        num_prompt = len(self.prompt_ids)
        prompt = list(self.prompt_ids[start:stop])
        if stop <= num_prompt:
            return prompt
        return prompt + self.output_ids[max(0, start - num_prompt) : stop - num_prompt]

    def uniform(self) -> float:
        """The next of the sequence's random numbers, in [0, 1)."""
        return self._random.random()

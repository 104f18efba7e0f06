"""A request on its way through the engine."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from moeruntime.kv_cache import ChainLink, blocks_for
from moeruntime.request import FinishReason, Output, SamplingParams, TokenLogprobs

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
        logprobs, prompt_logprobs: what was found so far, where its sampling asks for them.
        arrived_s: when it was queued, on the clock of whoever orders what waits.
        deadline_s: when its first token is due, on the same clock.
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
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    arrived_s: float = 0.0
    deadline_s: float = math.inf
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
    def shareable_ids(self) -> Items[int]:
        """The beginning of the prompt that may come from the cache instead of being run.

        At least one token must run, for there to be something to choose the next one by; all of
        them must where the model's opinion of the prompt is asked for.
        """
        return self.prompt_ids[:-1] if self.sampling.prompt_logprobs is None else ()

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

    def output(self, text: str, reason: FinishReason) -> Output:
        """What its caller gets at the end."""
        asked = tuple(self.source_ids or self.prompt_ids)
        return Output(
            self.variant,
            text,
            tuple(self.output_ids),
            len(asked),
            reason,
            asked,
            tuple(self.logprobs),
            tuple(self.prompt_logprobs),
        )

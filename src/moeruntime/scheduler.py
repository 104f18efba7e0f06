"""Which sequences run in the next step. Pure Python: no tensors, no clock.

A sequence is admitted when a place in the batch, its variant and its cache blocks are there. It
takes the blocks of its longest possible life at once, so nothing that runs is ever preempted.

Of these blocks it shares those that hold the beginning of its prompt already, and its own full
blocks can be found by those that come after it.

A waiting sequence already holds its variant's slot if one can be had, so that weights are copied
while it waits for the rest. Only those that arrived before the first one without a slot do: later
ones would otherwise keep from it the slots it waits for.

Admission is in the order of the waiting room (`waiting.py`), except that a sequence whose variant
finds no resident slot lets later ones pass until it is overdue: then nothing new is admitted until
a slot drains, so no variant starves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from moeruntime.kv_cache import BLOCK_TOKENS, BlockPool
from moeruntime.sequence import Sequence
from moeruntime.waiting import ArrivalOrder, WaitingRoom

__all__ = ["Chunk", "Scheduler", "VariantSlots"]


class VariantSlots(Protocol):
    """What the scheduler needs to know of residency."""

    def admit(self, variant: str) -> bool:
        """Hold the variant for one sequence, activating it if a slot can be had."""
        ...

    def release(self, variant: str) -> None:
        """End one sequence's hold."""
        ...

    def ready(self, variant: str) -> bool:
        """Whether an admitted variant's weights have arrived."""
        ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """`num_tokens` pending tokens of one sequence, to run in this step."""

    sequence: Sequence
    num_tokens: int


class Scheduler:
    """Continuous batching over sequences of many variants."""

    def __init__(
        self,
        blocks: BlockPool,
        variants: VariantSlots,
        *,
        max_sequences: int,
        max_step_tokens: int,
        prefix_cache: bool = True,
        waiting: WaitingRoom | None = None,
    ) -> None:
        """Start empty.

        Args:
            blocks: the cache's free list.
            variants: residency.
            max_sequences: most sequences in a step.
            max_step_tokens: most tokens in a step; long prompts are cut into chunks.
            prefix_cache: whether sequences share the blocks of a common beginning.
            waiting: who goes first; None takes them in order of arrival.
        """
        assert 1 <= max_sequences <= max_step_tokens
        self._blocks = blocks
        self._variants = variants
        self._max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens
        self._prefix_cache = prefix_cache
        self.num_reused_tokens = 0
        """Tokens of prompts that were in the cache already."""
        self.waiting: WaitingRoom = waiting if waiting is not None else ArrivalOrder()
        self.waiting.bind(max_sequences, blocks.num_blocks)
        self.running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not len(self.waiting) and not self.running

    @property
    def may_admit(self) -> bool:
        """Whether `schedule` could admit somebody now; where it is False that is certain."""
        if not len(self.waiting) or len(self.running) == self._max_sequences:
            return False
        first = next(self.waiting.candidates(), None)
        if first is None or not first.holds_slot:
            return first is not None
        # Blocks are given in the order of admission, so nobody passes one who waits for them.
        most_shared = len(first.shareable_ids) // BLOCK_TOKENS if self._prefix_cache else 0
        return first.num_blocks_needed - most_shared <= self._blocks.num_free

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; it must fit the cache when nothing else runs."""
        assert sequence.num_blocks_needed <= self._blocks.num_blocks
        self.waiting.add(sequence)
        self._hold_slots()

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or aborted, and take back all it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._publish(sequence)
            self._blocks.free(sequence.block_table)
            sequence.block_table = []
            self.waiting.ended(sequence)
        else:
            self.waiting.remove(sequence)
        if sequence.holds_slot:
            self._variants.release(sequence.variant)
            sequence.holds_slot = False

    def schedule(self) -> list[Chunk]:
        """Admit what fits and choose the next step's tokens: decodes first, then prompts.

        Sequences of a variant that is still being copied sit out while others can run.
        """
        for seq in self.running:
            self._publish(seq)
        self._admit()
        ready = [seq for seq in self.running if self._variants.ready(seq.variant)]
        runnable = ready or self.running
        decoding = [seq for seq in runnable if seq.num_pending == 1 and not seq.num_unread]
        prompts = [seq for seq in runnable if seq.num_pending > 1 or seq.num_unread]
        budget = self._max_step_tokens - len(decoding)
        prompt_tokens = self.waiting.prompt_tokens(decoding, prompts)
        budget = budget if prompt_tokens is None else min(budget, prompt_tokens)
        chunks = [Chunk(seq, 1) for seq in decoding]
        reads = False
        for seq in self.waiting.order_prompts(prompts):
            # An encoder reads a source whole. One is read whatever it takes: it would never fit
            # beside many decodes.
            if reads and seq.num_unread + 1 > budget:
                continue
            reads = reads or seq.num_unread > 0
            count = min(seq.num_pending, budget)
            if count == 0:
                break
            chunks.append(Chunk(seq, count))
            budget = max(0, budget - count - seq.num_unread)
        self.waiting.ran(decoding, sum(chunk.num_tokens for chunk in chunks[len(decoding) :]))
        return chunks

    def went_on(self, sequences: Iterable[Sequence]) -> None:
        """The step after the last one was run without asking: the same sequences, a token each."""
        self.waiting.ran(list(sequences), num_prompt_tokens=0)

    def _hold_slots(self) -> None:
        """Hold slots for waiting sequences, up to the first that finds none."""
        holding: list[Sequence] = []
        for seq in self.waiting.heads():
            if not seq.holds_slot:
                if not self._variants.admit(seq.variant) and not self._take_slot(seq, holding):
                    return
                seq.holds_slot = True
            holding.append(seq)

    def _take_slot(self, seq: Sequence, before: list[Sequence]) -> bool:
        """Let go of the slots that less wanted sequences wait with; whether one could be had."""
        others = [one for one in self.waiting if one.holds_slot and one not in before]
        for one in others:
            self._variants.release(one.variant)
            one.holds_slot = False
        return bool(others) and self._variants.admit(seq.variant)

    def _admit(self) -> None:
        self._hold_slots()
        num_running = len(self.running)
        passed: list[Sequence] = []
        without_slot: set[str] = set()
        for seq in self.waiting.candidates(without_slot):
            if len(self.running) == self._max_sequences:
                break
            if any(self.waiting.overdue(earlier) for earlier in passed):
                break
            held = seq.holds_slot
            if not held and not self._variants.admit(seq.variant):
                passed.append(seq)
                without_slot.add(seq.variant)
                continue
            if not self._take_blocks(seq):
                if not held:
                    self._variants.release(seq.variant)
                break
            seq.holds_slot = True
            self.waiting.admitted(seq)
            self.running.append(seq)
            for earlier in passed:
                earlier.times_passed += 1
        if len(self.running) > num_running:
            self._hold_slots()

    def _take_blocks(self, seq: Sequence) -> bool:
        """Give a sequence all its blocks, shared ones first; False, taking none, if too few."""
        shared: list[int] = []
        chain = seq.chain
        if self._prefix_cache:
            shared, chain = self._blocks.share(seq.variant, seq.shareable_ids)
        own = self._blocks.allocate(seq.num_blocks_needed - len(shared))
        if own is None:
            self._blocks.free(shared)
            return False
        seq.block_table = shared + own
        seq.chain, seq.num_published = chain, len(shared)
        seq.num_cached = len(shared) * BLOCK_TOKENS
        self.num_reused_tokens += seq.num_cached
        return True

    def _publish(self, seq: Sequence) -> None:
        """Let others find the blocks that the last step filled."""
        if not self._prefix_cache:
            return
        # A step may have been launched whose token nobody has seen.
        num_known = min(seq.num_cached, len(seq.prompt_ids) + len(seq.output_ids))
        while (seq.num_published + 1) * BLOCK_TOKENS <= num_known:
            start = seq.num_published * BLOCK_TOKENS
            tokens = seq.ids(start, start + BLOCK_TOKENS)
            block = seq.block_table[seq.num_published]
            seq.chain = self._blocks.publish(seq.chain, tokens, block)
            seq.num_published += 1

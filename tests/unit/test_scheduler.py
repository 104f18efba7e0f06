"""The scheduler against a table of slots that counts, without a model."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from moeruntime.kv_cache import BLOCK_TOKENS, BlockPool, blocks_for
from moeruntime.request import SamplingParams
from moeruntime.residency import SlotTable
from moeruntime.scheduler import Chunk, Scheduler
from moeruntime.sequence import Sequence
from moeruntime.waiting import MAX_TIMES_PASSED


class Slots:
    """Residency without weights: the real slot table, a log, and variants that arrive late."""

    def __init__(self, num_slots: int) -> None:
        self._table = SlotTable(num_slots)
        self.held: Counter[str] = Counter()
        self.copying: set[str] = set()
        self.log: list[str] = []

    def admit(self, variant: str) -> bool:
        if self._table.hold(variant) is None:
            return False
        self.held[variant] += 1
        self.log.append(variant)
        return True

    def release(self, variant: str) -> None:
        assert self.held[variant] > 0
        self.held[variant] -= 1
        self._table.release(variant)

    def ready(self, variant: str) -> bool:
        return variant not in self.copying


_ids = iter(range(10**9))


def sequence(variant: str = "a", *, prompt: int = 4, max_tokens: int = 4) -> Sequence:
    """A sequence that shares its beginning with no other."""
    number = next(_ids)
    return Sequence(number, variant, [number] * prompt, SamplingParams(max_tokens=max_tokens))


def make(
    num_blocks: int = 64, num_slots: int = 2, *, max_sequences: int = 8, max_step_tokens: int = 64
) -> tuple[Scheduler, BlockPool, Slots]:
    blocks, slots = BlockPool(num_blocks), Slots(num_slots)
    scheduler = Scheduler(
        blocks, slots, max_sequences=max_sequences, max_step_tokens=max_step_tokens
    )
    return scheduler, blocks, slots


def advance(scheduler: Scheduler, chunks: list[Chunk]) -> list[Sequence]:
    """What the engine does with a step's chunks; returns the sequences that finished."""
    finished = []
    for chunk in chunks:
        seq = chunk.sequence
        seq.num_cached += chunk.num_tokens
        if seq.num_pending == 0:
            seq.output_ids.append(7)
            if len(seq.output_ids) == seq.sampling.max_tokens:
                scheduler.remove(seq)
                finished.append(seq)
    return finished


def test_an_idle_scheduler_has_nothing_to_run() -> None:
    scheduler, _, _ = make()
    assert scheduler.idle
    assert scheduler.schedule() == []


def test_sequences_are_admitted_in_order_of_arrival() -> None:
    scheduler, _, _ = make(max_sequences=3)
    arrived = [sequence() for _ in range(7)]
    for seq in arrived:
        scheduler.add(seq)
    order: list[Sequence] = []
    while not scheduler.idle:
        chunks = scheduler.schedule()
        assert len(chunks) <= 3
        order += [c.sequence for c in chunks if c.sequence not in order]
        advance(scheduler, chunks)
    assert order == arrived


def test_a_short_sequence_does_not_pass_a_long_one_that_waits_for_blocks() -> None:
    scheduler, _, _ = make(num_blocks=4)
    first = sequence(prompt=2 * BLOCK_TOKENS)
    long = sequence(prompt=3 * BLOCK_TOKENS, max_tokens=1)
    short = sequence(prompt=1, max_tokens=1)
    for seq in (first, long, short):
        scheduler.add(seq)
    scheduler.schedule()
    assert scheduler.running == [first]
    scheduler.remove(first)
    scheduler.schedule()
    assert scheduler.running == [long, short]


def test_a_sequence_takes_the_blocks_of_its_longest_life_at_once() -> None:
    scheduler, blocks, _ = make(num_blocks=8)
    seq = sequence(prompt=BLOCK_TOKENS, max_tokens=BLOCK_TOKENS + 1)
    scheduler.add(seq)
    scheduler.schedule()
    # The last token chosen is never run: 16 + 17 - 1 tokens are cached.
    assert len(seq.block_table) == 2
    assert blocks.num_free == 6


def test_a_sequence_may_take_the_whole_cache() -> None:
    scheduler, blocks, _ = make(num_blocks=2)
    seq = sequence(prompt=BLOCK_TOKENS, max_tokens=BLOCK_TOKENS + 1)
    scheduler.add(seq)
    assert [c.sequence for c in scheduler.schedule()] == [seq]
    assert blocks.num_free == 0


def test_long_prompts_are_cut_into_chunks_that_fill_the_step() -> None:
    scheduler, _, _ = make(max_step_tokens=10, max_sequences=4)
    long, other = sequence(prompt=25), sequence(prompt=7)
    scheduler.add(long)
    scheduler.add(other)
    seen = []
    for _ in range(4):
        chunks = scheduler.schedule()
        seen.append([(c.sequence is long, c.num_tokens) for c in chunks])
        advance(scheduler, chunks)
    assert seen == [
        [(True, 10)],
        [(True, 10)],
        [(True, 5), (False, 5)],
        [(True, 1), (False, 2)],
    ]


def test_decodes_come_before_prompts_however_late_they_were_admitted() -> None:
    scheduler, _, _ = make(max_step_tokens=8, max_sequences=8)
    long, quick = sequence(prompt=40), sequence(prompt=1)
    scheduler.add(long)
    scheduler.add(quick)
    chunks = scheduler.schedule()
    assert [(c.sequence, c.num_tokens) for c in chunks] == [(quick, 1), (long, 7)]


def test_a_prompt_gets_on_even_when_all_others_decode() -> None:
    scheduler, _, _ = make(max_step_tokens=4, max_sequences=4)
    for _ in range(3):
        scheduler.add(sequence(prompt=1, max_tokens=50))
    long = sequence(prompt=20, max_tokens=1)
    scheduler.add(long)
    for step in range(20):
        chunks = scheduler.schedule()
        assert sum(c.num_tokens for c in chunks) <= 4
        assert long.num_cached == step
        advance(scheduler, chunks)
    assert long.output_ids


def test_a_variant_still_being_copied_sits_out_while_others_run() -> None:
    scheduler, _, slots = make()
    cold, warm = sequence("cold"), sequence("warm")
    slots.copying.add("cold")
    scheduler.add(cold)
    scheduler.add(warm)
    assert [c.sequence for c in scheduler.schedule()] == [warm]
    slots.copying.clear()
    assert [c.sequence for c in scheduler.schedule()] == [cold, warm]


def test_when_all_variants_are_being_copied_the_step_waits_for_one_of_them() -> None:
    scheduler, _, slots = make()
    seq = sequence("cold")
    slots.copying.add("cold")
    scheduler.add(seq)
    assert [c.sequence for c in scheduler.schedule()] == [seq]


def test_a_variant_is_copied_while_its_sequence_waits_for_a_place_or_blocks() -> None:
    for options in ({"max_sequences": 1}, {"num_blocks": 1}):
        scheduler, _, slots = make(**options)
        running, waiting = sequence("a"), sequence("b")
        scheduler.add(running)
        assert [c.sequence for c in scheduler.schedule()] == [running]
        scheduler.add(waiting)
        assert slots.log == ["a", "b"], "at once, not in the next step"
        scheduler.schedule()
        assert scheduler.running == [running]
        scheduler.remove(running)
        scheduler.schedule()
        assert (scheduler.running, slots.log) == ([waiting], ["a", "b"])


def test_a_slot_that_drains_goes_to_the_first_that_waits_for_one() -> None:
    scheduler, _, slots = make(num_slots=1, max_sequences=1)
    running, first, second = sequence("a"), sequence("b"), sequence("a")
    for seq in (running, first, second):
        scheduler.add(seq)
    assert not second.holds_slot, "it would keep the slot from the one before it"
    scheduler.schedule()
    scheduler.remove(running)
    scheduler.schedule()
    assert (scheduler.running, slots.log) == ([first], ["a", "b"])


def test_an_aborted_sequence_lets_go_of_the_slot_it_waited_with() -> None:
    scheduler, _, slots = make(max_sequences=1)
    running, waiting = sequence("a"), sequence("b")
    for seq in (running, waiting):
        scheduler.add(seq)
    scheduler.schedule()
    scheduler.remove(waiting)
    assert +slots.held == Counter("a")
    assert not waiting.holds_slot


def test_a_sequence_without_a_slot_lets_others_pass() -> None:
    scheduler, _, _ = make(num_slots=1)
    first, blocked, later = sequence("a"), sequence("b"), sequence("a")
    for seq in (first, blocked, later):
        scheduler.add(seq)
    assert [c.sequence for c in scheduler.schedule()] == [first, later]
    assert blocked.times_passed == 1


@pytest.mark.parametrize("arrivals", [1, 5, 100])
def test_no_sequence_is_passed_more_often_than_the_bound(arrivals: int) -> None:
    scheduler, _, _ = make(num_blocks=256, num_slots=1, max_sequences=64)
    starving = sequence("b", max_tokens=1)
    scheduler.add(sequence("a", max_tokens=3))
    scheduler.add(starving)
    for _ in range(400):
        for _ in range(arrivals):
            scheduler.add(sequence("a", max_tokens=3))
        finished = advance(scheduler, scheduler.schedule())
        assert starving.times_passed <= MAX_TIMES_PASSED
        if starving in finished:
            assert starving.times_passed == MAX_TIMES_PASSED
            return
    pytest.fail("the other variant's requests starved it")


def test_removing_a_waiting_sequence_leaves_the_others_alone() -> None:
    scheduler, blocks, slots = make(max_sequences=1)
    first, second, third = (sequence() for _ in range(3))
    for seq in (first, second, third):
        scheduler.add(seq)
    scheduler.schedule()
    scheduler.remove(second)
    scheduler.remove(first)
    assert blocks.num_free == 64
    assert slots.held["a"] == 1, "by the third, which waits"
    scheduler.schedule()
    assert scheduler.running == [third]


@pytest.mark.parametrize("seed", range(6))
def test_random_arrivals_and_aborts_keep_every_promise(seed: int) -> None:
    rng = random.Random(seed)
    max_sequences = rng.randint(1, 6)
    max_step_tokens = rng.randint(max_sequences, 40)
    num_slots = rng.randint(1, 3)
    scheduler, blocks, slots = make(
        24, num_slots, max_sequences=max_sequences, max_step_tokens=max_step_tokens
    )
    alive: list[Sequence] = []
    num_finished = 0
    for step in range(1500):
        if step < 1200 and rng.random() < 0.5:
            for _ in range(rng.randint(1, 4)):
                seq = sequence(
                    rng.choice("abcde"), prompt=rng.randint(1, 120), max_tokens=rng.randint(1, 30)
                )
                alive.append(seq)
                scheduler.add(seq)
        if alive and rng.random() < 0.2:
            seq = alive.pop(rng.randrange(len(alive)))
            scheduler.remove(seq)
            assert seq.block_table == []
        if alive and rng.random() < 0.05:
            slots.copying = {rng.choice("abcde")}
        chunks = scheduler.schedule()

        running = scheduler.running
        assert bool(chunks) == bool(alive), "work there is, and none of it was chosen"
        assert len(running) <= max_sequences
        assert sum(c.num_tokens for c in chunks) <= max_step_tokens
        assert len({id(c.sequence) for c in chunks}) == len(chunks)
        assert all(c.sequence in running for c in chunks)
        assert all(1 <= c.num_tokens <= c.sequence.num_pending for c in chunks)
        owned = [block for seq in running for block in seq.block_table]
        assert len(owned) == len(set(owned)), "two sequences own one block"
        assert len(owned) + blocks.num_free == blocks.num_blocks
        for seq in running:
            assert len(seq.block_table) == blocks_for(
                len(seq.prompt_ids) + seq.sampling.max_tokens - 1
            )
        assert all(seq.holds_slot for seq in running)
        assert +slots.held == Counter(seq.variant for seq in alive if seq.holds_slot)
        waiting = [seq.holds_slot for seq in scheduler.waiting]
        assert waiting == sorted(waiting, reverse=True), "a later one holds, an earlier one waits"
        assert len(+slots.held) <= num_slots
        assert all(seq.times_passed <= MAX_TIMES_PASSED for seq in alive)

        for seq in advance(scheduler, chunks):
            alive.remove(seq)
            num_finished += 1
    while not scheduler.idle:
        for seq in advance(scheduler, scheduler.schedule()):
            alive.remove(seq)
            num_finished += 1
    assert num_finished > 50
    assert not alive
    assert blocks.num_free == blocks.num_blocks
    assert not +slots.held
    assert sorted(blocks.allocate(24) or []) == list(range(24))


# -- may_admit -----------------------------------------------------------------------------------


def test_a_full_batch_admits_nobody_and_one_with_a_place_may() -> None:
    scheduler, _, _ = make(max_sequences=2)
    assert not scheduler.may_admit, "nobody waits"
    first, second, third = (sequence() for _ in range(3))
    for seq in (first, second, third):
        scheduler.add(seq)
    assert scheduler.may_admit
    scheduler.schedule()
    assert not scheduler.may_admit
    scheduler.remove(first)
    assert scheduler.may_admit
    scheduler.schedule()
    assert third in scheduler.running


def test_who_waits_for_blocks_keeps_everybody_behind_out() -> None:
    scheduler, _, _ = make(num_blocks=4)
    large = sequence(prompt=3 * BLOCK_TOKENS, max_tokens=1)
    other = sequence(prompt=3 * BLOCK_TOKENS, max_tokens=1)
    small = sequence(prompt=1, max_tokens=1)
    scheduler.add(large)
    scheduler.schedule()
    for seq in (other, small):
        scheduler.add(seq)
    # Two of its three blocks might be found in the cache, so one free block may be enough.
    assert scheduler.may_admit
    assert other not in [chunk.sequence for chunk in scheduler.schedule()]
    longer = sequence(prompt=1, max_tokens=3 * BLOCK_TOKENS)
    scheduler.remove(other)
    scheduler.remove(small)
    for seq in (longer, small):
        scheduler.add(seq)
    assert not scheduler.may_admit, "no prompt to share, and one block is free"
    scheduler.schedule()
    assert scheduler.running == [large]


def test_where_may_admit_says_no_nothing_is_admitted() -> None:
    numbers = random.Random(3)
    said_no = 0
    for _ in range(40):
        scheduler, _, _ = make(num_blocks=8, num_slots=2, max_sequences=numbers.randint(1, 4))
        for _ in range(30):
            if numbers.random() < 0.5:
                variant = numbers.choice("abc")
                prompt, tokens = numbers.randint(1, 60), numbers.randint(1, 40)
                scheduler.add(sequence(variant, prompt=prompt, max_tokens=tokens))
            before, may = list(scheduler.running), scheduler.may_admit
            chunks = scheduler.schedule()
            if not may:
                said_no += bool(scheduler.waiting)
                assert scheduler.running == before
            advance(scheduler, chunks)
    assert said_no > 50

"""Shared beginnings: what a sequence reads is always its own variant's and its own text's."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence as Items

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeruntime import Engine, Request, SamplingParams
from moeruntime.kv_cache import BLOCK_TOKENS, BlockPool
from moeruntime.scheduler import Chunk, Scheduler
from moeruntime.sequence import Sequence
from moeruntime.synthetic import SyntheticSource

A, B = [1] * BLOCK_TOKENS, [2] * BLOCK_TOKENS


class AlwaysThere:
    """Residency in which every variant has a slot."""

    def admit(self, variant: str) -> bool:
        return True

    def release(self, variant: str) -> None:
        pass

    def ready(self, variant: str) -> bool:
        return True


class Machine:
    """A scheduler, and a cache that remembers what each row stands for."""

    def __init__(self, num_blocks: int, *, prefix_cache: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(
            self.pool,
            AlwaysThere(),
            max_sequences=4,
            max_step_tokens=40,
            prefix_cache=prefix_cache,
        )
        # (block, row) -> variant and all tokens up to that one.
        self._rows: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self.alive: list[Sequence] = []
        self.num_run = 0

    def add(self, variant: str, prompt: Items[int], max_tokens: int = 1) -> Sequence:
        seq = Sequence(0, variant, prompt, SamplingParams(max_tokens=max_tokens))
        self.scheduler.add(seq)
        self.alive.append(seq)
        return seq

    def abort(self, seq: Sequence) -> None:
        self.scheduler.remove(seq)
        self.alive.remove(seq)

    def step(self) -> None:
        chunks = self.scheduler.schedule()
        assert bool(chunks) == bool(self.alive)
        for chunk in chunks:
            self._run(chunk)
        self.check()

    def drain(self) -> None:
        while self.alive:
            self.step()
        assert self.pool.num_free == self.pool.num_blocks

    def check(self) -> None:
        owned = {block for seq in self.scheduler.running for block in seq.block_table}
        assert len(owned) + self.pool.num_free == self.pool.num_blocks
        for seq in self.scheduler.running:
            assert len(set(seq.block_table)) == len(seq.block_table)

    def _run(self, chunk: Chunk) -> None:
        seq, start = chunk.sequence, chunk.sequence.num_cached
        assert seq.num_pending > 0
        stop = start + chunk.num_tokens
        text = tuple(seq.ids(0, stop))
        self.num_run += chunk.num_tokens
        for at in range(start, stop):
            block = seq.block_table[at // BLOCK_TOKENS]
            others = [one for one in self.scheduler.running if one is not seq]
            assert all(block not in one.block_table for one in others), "wrote what others read"
            self._rows[block, at % BLOCK_TOKENS] = (seq.variant, text[: at + 1])
        for at in range(stop):
            row = self._rows[seq.block_table[at // BLOCK_TOKENS], at % BLOCK_TOKENS]
            assert row == (seq.variant, text[: at + 1]), "read what is not its own"
        seq.num_cached = stop
        if seq.num_pending == 0:
            # The next token depends on the whole text, as a model's would.
            seq.output_ids.append(sum(text) % 3)
            if len(seq.output_ids) == seq.sampling.max_tokens:
                self.scheduler.remove(seq)
                self.alive.remove(seq)


# Few kinds of blocks, so that texts have beginnings in common; ends of any length.
PROMPTS = st.tuples(
    st.lists(st.sampled_from([A, B]), max_size=4), st.integers(0, BLOCK_TOKENS - 1)
).map(lambda parts: [token for block in parts[0] for token in block] + [3] * parts[1] or [3])
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("xyz"), PROMPTS, st.integers(1, 40)),
        st.integers(0, 3),  # so many steps
        st.floats(0, 0.999),  # abort whoever is at this place
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(events=EVENTS, num_blocks=st.integers(8, 20), prefix_cache=st.booleans())
def test_nothing_leaks_is_freed_twice_or_read_by_others(
    events: list[object], num_blocks: int, prefix_cache: bool
) -> None:
    machine = Machine(num_blocks, prefix_cache=prefix_cache)
    for event in events:
        if isinstance(event, tuple):
            machine.add(*event)
        elif isinstance(event, int):
            for _ in range(event):
                machine.step()
        elif isinstance(event, float) and machine.alive:
            machine.abort(machine.alive[int(event * len(machine.alive))])
            machine.check()
    machine.drain()
    assert prefix_cache or machine.scheduler.num_reused_tokens == 0
    assert sorted(machine.pool.allocate(num_blocks) or []) == list(range(num_blocks))


def test_a_finished_beginning_is_reused_and_one_token_always_runs() -> None:
    machine = Machine(32)
    machine.add("x", A + B)
    machine.drain()
    before = machine.num_run
    for prompt, num_run in ((A + B, BLOCK_TOKENS), (A + B + [3], 1), (A + A, BLOCK_TOKENS)):
        machine.add("x", prompt)
        machine.drain()
        assert machine.num_run == before + num_run
        before = machine.num_run
    assert machine.scheduler.num_reused_tokens == 4 * BLOCK_TOKENS


def test_answers_can_be_gone_on_from() -> None:
    machine = Machine(32)
    first = machine.add("x", A, max_tokens=BLOCK_TOKENS + 1)
    machine.drain()
    machine.add("x", [*A, *first.output_ids, 3])
    machine.drain()
    assert machine.scheduler.num_reused_tokens == 2 * BLOCK_TOKENS


def test_a_running_sequence_shares_what_it_has_filled() -> None:
    machine = Machine(32)
    first = machine.add("x", A + B, max_tokens=30)
    machine.step()
    second = machine.add("x", A + B + A, max_tokens=2)
    machine.step()
    assert first in machine.alive
    assert second.block_table[:2] == first.block_table[:2]
    assert machine.scheduler.num_reused_tokens == 2 * BLOCK_TOKENS
    machine.abort(first)
    machine.drain()


def test_variants_share_nothing() -> None:
    machine = Machine(32)
    for variant in "xyz":
        machine.add(variant, A + B)
        machine.drain()
    assert machine.scheduler.num_reused_tokens == 0


def test_the_block_used_least_recently_goes_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4)
    tables = {}
    for variant, blocks in (("x", [A, B]), ("y", [A, B])):
        table = pool.allocate(2)
        assert table is not None
        link = pool.publish(variant, blocks[0], table[0])
        pool.publish(link, blocks[1], table[1])
        pool.free(table)
        tables[variant] = table
    found, _ = pool.share("x", A)
    pool.free(found)
    assert found == tables["x"][:1], "used again: now y's are the oldest but for x's end"
    assert pool.num_free == 4
    assert pool.allocate(1) == tables["x"][1:]
    assert pool.allocate(1) == tables["y"][1:]
    assert pool.allocate(1) == tables["y"][:1]
    assert pool.share("y", A + B)[0] == []
    assert pool.share("x", A + B)[0] == tables["x"][:1]
    assert pool.allocate(1) is None


def test_a_text_published_twice_has_one_block() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None and second is not None
    link = pool.publish("x", A, first[0])
    assert pool.publish("x", A, second[0]) == link
    pool.free(second)
    assert pool.share("x", A) == (first, link)
    pool.free(first)
    pool.free(first)
    assert pool.num_free == 3


def test_outputs_are_the_same_with_and_without() -> None:
    rng = random.Random(0)
    blocks = [[rng.randrange(512) for _ in range(BLOCK_TOKENS)] for _ in range(3)]
    requests = []
    for _ in range(60):
        prompt = [token for block in rng.choices(blocks, k=rng.randint(0, 4)) for token in block]
        prompt += [rng.randrange(512) for _ in range(rng.randint(1, 10))]
        params = SamplingParams(
            max_tokens=rng.randint(1, 12),
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.randrange(99),
        )
        requests.append(Request(rng.choice(["v0", "v1"]), prompt, params))
    answers = []
    for prefix_cache in (False, True):
        source = SyntheticSource("mixtral-tiny", num_variants=2)
        with Engine(
            source, device="cpu", max_sequences=4, cache_bytes=2**20, prefix_cache=prefix_cache
        ) as engine:
            answers.append([engine.generate([request])[0] for request in requests[:20]])
            answers[-1] += engine.generate(requests)
            assert (engine.scheduler.num_reused_tokens > 1000) == prefix_cache
            assert engine.num_free_blocks == engine.memory.num_blocks
    assert answers[0] == answers[1]
    assert Counter(len(output.token_ids) for output in answers[0]).total() == 80


def test_a_step_that_failed_is_not_shared() -> None:
    request = Request("v0", list(range(100)), SamplingParams(max_tokens=4))
    with Engine(SyntheticSource("mixtral-tiny"), device="cpu", prefix_cache=False) as engine:
        expected = engine.generate([request])
    with Engine(SyntheticSource("mixtral-tiny"), device="cpu") as engine:
        forward = engine.model.forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.model, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.generate([request])
        assert engine.model.forward == forward
        assert engine.num_free_blocks == engine.memory.num_blocks
        assert engine.generate([request]) == expected
        assert engine.scheduler.num_reused_tokens == 0


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt

"""Fair shares and deadlines: the real scheduler, on simulated time."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import _simulation
import pytest
from _simulation import Arrival, Clients, Clock, Served, percentile, poisson, read_trace, simulate

from moeruntime.cost_model import LearnedCost, StepCost
from moeruntime.errors import InputError, UsageError
from moeruntime.kv_cache import BlockPool
from moeruntime.qos import FairShare, Targets, read_targets
from moeruntime.request import SamplingParams
from moeruntime.scheduler import Scheduler
from moeruntime.sequence import Sequence
from moeruntime.waiting import MAX_TIMES_PASSED

VARIANTS = ("a", "b", "c", "d")
TRACE = Path(_simulation.__file__).with_name("arrivals.jsonl")


def h200(num_decodes: int, num_prompt_tokens: int, num_variants: int) -> float:
    """About what one H200 takes for Mixtral-8x7B (docs/benchmarks.md)."""
    prompts_s = 0.013 + 3.3e-5 * num_prompt_tokens if num_prompt_tokens else 0.0
    return 0.0185 + 1e-4 * num_decodes + prompts_s + 0.001 * (num_variants - 1)


def fair(clock: Clock, **targets: Targets) -> FairShare:
    return FairShare(
        {name: targets.get(name, Targets(0.5, 0.05)) for name in VARIANTS}, clock=clock
    )


# -- floods --------------------------------------------------------------------------------------


def p99_beside(num_clients: int, *, sharing: bool, rate_per_s: float = 1.0) -> float:
    """99th percentile of the others' TTFT while `num_clients` ask d without pause."""
    clock = Clock()
    others = poisson(
        VARIANTS[:3], rate_per_s, 110.0, seed=1, num_prompt=(64, 512), num_new=(16, 128)
    )
    served = simulate(
        others,
        h200,
        clock=clock,
        waiting=fair(clock) if sharing else None,
        clients=[Clients("d", num_clients, 256, 64, from_s=10.0, until_s=110.0)],
        max_sequences=64,
    )
    assert sum(one.arrival.variant != "d" for one in served) == len(others), "none is lost"
    return percentile(
        (one.ttft_s for one in served if one.arrival.variant != "d" and one.arrival.at_s >= 10.0),
        0.99,
    )


@pytest.mark.parametrize("rate_per_s", [1.0, 2.0])
def test_a_flood_of_100_clients_moves_the_others_by_less_than_a_quarter(rate_per_s: float) -> None:
    usual = p99_beside(8, sharing=True, rate_per_s=rate_per_s)
    flooded = p99_beside(100, sharing=True, rate_per_s=rate_per_s)
    assert flooded <= 1.25 * usual


def test_in_order_of_arrival_the_same_flood_drowns_them() -> None:
    assert p99_beside(100, sharing=False) > 10 * p99_beside(8, sharing=False)


def test_recorded_arrivals_beside_a_flood() -> None:
    """The trace was recorded by benchmarks/serve_load.py; its `base` becomes the flood."""
    recorded = [one for one in read_trace(TRACE) if one.variant != "base"][:300]

    def run(num_clients: int) -> float:
        clock = Clock()
        targets = {name: Targets(0.5, 0.05) for name in ("base", "python", "math", "shell")}
        served = simulate(
            recorded,
            h200,
            clock=clock,
            waiting=FairShare(targets, clock=clock),
            clients=[Clients("base", num_clients, 64, 16, from_s=2.0, until_s=8.0)],
            max_sequences=128,
        )
        mine = [one for one in served if one.arrival.variant != "base"]
        assert len(mine) == len(recorded)
        return percentile((one.ttft_s for one in mine if one.arrival.at_s < 8.0), 0.99)

    assert run(100) <= 1.25 * run(16)


# -- shares, deadlines, steps ------------------------------------------------------------------


def tokens_by_variant(served: list[Served], until_s: float) -> Counter[str]:
    counts: Counter[str] = Counter()
    for one in served:
        if one.last_s <= until_s:
            counts[one.arrival.variant] += one.arrival.num_new
    return counts


def test_who_has_three_times_the_weight_gets_three_times_the_tokens() -> None:
    clock = Clock()
    waiting = fair(clock, a=Targets(weight=3.0), b=Targets(weight=1.0))
    clients = [Clients(name, 60, 32, 16, from_s=0.0, until_s=60.0) for name in ("a", "b")]
    counts = tokens_by_variant(
        simulate([], h200, clock=clock, waiting=waiting, clients=clients, max_sequences=16), 60.0
    )
    assert counts["a"] / counts["b"] == pytest.approx(3.0, rel=0.25)


def test_of_those_with_a_fair_claim_the_earliest_deadline_goes_first() -> None:
    clock = Clock()
    waiting = fair(clock, a=Targets(ttft_s=5.0), b=Targets(ttft_s=0.2))
    scheduler = Scheduler(
        BlockPool(64), _AllResident(), max_sequences=8, max_step_tokens=64, waiting=waiting
    )
    order = [_sequence("a"), _sequence("a"), _sequence("b"), _sequence("b")]
    for seq in order:
        scheduler.add(seq)
    assert [seq.variant for seq in waiting.heads()] == ["b", "a"]
    scheduler.schedule()
    assert [seq.variant for seq in scheduler.running] == ["b", "b", "a", "a"]


def test_who_comes_back_from_a_pause_has_saved_nothing_up() -> None:
    clock = Clock()
    waiting = fair(clock)
    clients = [
        Clients("a", 40, 16, 16, from_s=0.0, until_s=40.0),
        Clients("b", 40, 16, 16, from_s=20.0, until_s=40.0),
    ]
    served = simulate([], h200, clock=clock, waiting=waiting, clients=clients, max_sequences=16)
    late = [one for one in served if 22.0 < one.last_s < 40.0]
    counts = Counter(one.arrival.variant for one in late)
    assert counts["a"] / counts["b"] == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("tpot_s", [0.04, 0.045, 0.06])
def test_a_load_of_prompts_leaves_others_their_time_per_token(tpot_s: float) -> None:
    """On average; it is under some of these that steps with prompts are cut."""
    clock = Clock()
    arrivals = [Arrival(0.1 * i, "a", 32, 400) for i in range(4)]
    arrivals += [Arrival(2.0 + 0.08 * i, "b", 2000, 1) for i in range(200)]
    served = simulate(arrivals, h200, clock=clock, waiting=fair(clock, a=Targets(tpot_s=tpot_s)))
    tpots = [one.tpot_s for one in served if one.arrival.variant == "a"]
    assert all(one is not None and one <= 1.05 * tpot_s for one in tpots)


def test_prompts_stretch_steps_only_while_those_that_decode_are_in_time() -> None:
    clock = Clock()
    waiting = fair(clock)
    decoding = [Sequence(0, "a", range(8), SamplingParams())]
    prompts = [Sequence(1, "b", range(1024), SamplingParams())]
    for seq in (*decoding, *prompts):
        waiting.add(seq)
    waiting.ran(decoding, 0)
    waiting.observe(0.02)
    assert waiting.prompt_tokens(decoding, prompts) == 1024
    for _ in range(200):
        waiting.ran(decoding, 0)
        waiting.observe(0.06)
    within = waiting.prompt_tokens(decoding, prompts)
    assert within is not None and within < 1024


def test_a_variant_without_a_slot_waits_no_longer_than_the_bound() -> None:
    clock = Clock()
    waiting = fair(clock)
    arrivals = [Arrival(1.0, "b", 16, 4)]
    clients = [Clients("a", 80, 16, 16, from_s=0.0, until_s=30.0)]
    served = simulate(
        arrivals,
        h200,
        clock=clock,
        waiting=waiting,
        clients=clients,
        num_slots=1,
        activation_s=0.06,
    )
    (mine,) = [one for one in served if one.arrival.variant == "b"]
    assert mine.ttft_s < 4.0, "a few requests pass, those that run end, and it is its turn"


@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals_and_aborts_lose_nothing(seed: int) -> None:
    rng = random.Random(seed)
    clock, blocks = Clock(), BlockPool(24)
    waiting = fair(clock, a=Targets(weight=4.0), b=Targets(ttft_s=0.01))
    slots = _simulation._Slots(rng.randint(1, 4), 0.05, clock)
    scheduler = Scheduler(blocks, slots, max_sequences=5, max_step_tokens=32, waiting=waiting)
    alive: list[Sequence] = []
    for step in range(1200):
        clock.now_s += rng.random() * 0.05
        if step < 900 and rng.random() < 0.5:
            prompt, tokens = rng.randint(1, 100), rng.randint(1, 30)
            alive.append(_sequence(rng.choice(VARIANTS), prompt, tokens))
            scheduler.add(alive[-1])
        if alive and rng.random() < 0.1:
            scheduler.remove(alive.pop(rng.randrange(len(alive))))
        may = scheduler.may_admit
        before = list(scheduler.running)
        chunks = scheduler.schedule()
        assert bool(chunks) == bool(alive), "work there is, and none of it was chosen"
        assert may or scheduler.running == before
        assert len(scheduler.waiting) + len(scheduler.running) == len(alive)
        assert all(seq.times_passed <= MAX_TIMES_PASSED for seq in alive)
        for chunk in chunks:
            seq = chunk.sequence
            seq.num_cached += chunk.num_tokens
            if seq.num_pending == 0:
                seq.output_ids.append(1)
                if len(seq.output_ids) == seq.sampling.max_tokens:
                    scheduler.remove(seq)
                    alive.remove(seq)
    for seq in alive:
        scheduler.remove(seq)
    assert blocks.num_free == 24 and scheduler.idle
    assert all(tenant.num_running == tenant.num_blocks == 0 for tenant in waiting._tenants.values())


_numbers = iter(range(10**9))


def _sequence(variant: str, prompt: int = 4, max_tokens: int = 4) -> Sequence:
    number = next(_numbers)
    return Sequence(number, variant, [number] * prompt, SamplingParams(max_tokens=max_tokens))


class _AllResident:
    def admit(self, variant: str) -> bool:
        return True

    def release(self, variant: str) -> None: ...

    def ready(self, variant: str) -> bool:
        return True


# -- the cost of steps ------------------------------------------------------------------------


def test_costs_are_learned_from_steps_with_noise() -> None:
    rng = random.Random(2)
    true = StepCost(0.02, 2e-4, 0.01, 4e-5)
    learned = LearnedCost(StepCost(1.0, 1.0, 1.0, 1.0))
    for _ in range(2000):
        decodes, tokens = rng.randint(0, 64), rng.choice([0, 0, 100, 500, 2000])
        learned.observe(decodes, tokens, true.step_s(decodes, tokens) * rng.uniform(0.95, 1.05))
    for decodes, tokens in ((1, 0), (64, 0), (8, 512), (64, 2000)):
        found = learned.cost.step_s(decodes, tokens)
        assert found == pytest.approx(true.step_s(decodes, tokens), rel=0.1)
    fitting = learned.cost.prompt_tokens_within(0.06, 16)
    assert true.step_s(16, fitting) == pytest.approx(0.06, rel=0.1)


def test_a_clock_that_jumps_teaches_nothing() -> None:
    learned = LearnedCost(StepCost(0.01, 0.0, 0.0, 1e-5))
    for elapsed_s in (-5.0, 0.0, 1e6):
        learned.observe(4, 0, elapsed_s)
    assert learned.cost.step_s(1, 0) == pytest.approx(0.01, rel=0.1)


# -- targets in a file ------------------------------------------------------------------------


def test_targets_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "qos.toml"
    path.write_text("[default]\nttft_s = 2\n[variants.b]\nweight = 3.5\nttft_s = 0.2\n")
    targets = read_targets(path, VARIANTS, Targets(tpot_s=0.3))
    assert targets["a"] == Targets(2.0, 0.3, 1.0)
    assert targets["b"] == Targets(0.2, 0.3, 3.5)
    assert read_targets(None, ("x",)) == {"x": Targets()}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[variants.nobody]\nweight = 1", "nobody"),
        ("[default]\nttft = 1", "unknown field"),
        ("[default]\nttft_s = -1", "ttft_s"),
        ("[default]\nweight = nan", "weight"),
        ("[default]\ntpot_s = 'x'", "tpot_s"),
        ("default = 1", "default"),
        ("[[", "not TOML"),
        ("[other]", "unknown field"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "qos.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as problem:
        read_targets(path, VARIANTS)
    assert str(path) in str(problem.value)


def test_no_file_and_no_variant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_targets(tmp_path / "none", VARIANTS)
    with pytest.raises(UsageError):
        FairShare({})


def test_prompts_of_those_ahead_are_cut_and_those_of_others_are_not() -> None:
    """Of a variant that had its share only what fits the step; of one whose turn it is, all."""
    clock = Clock()
    waiting = fair(clock)
    waiting.bind(64, 1 << 12)
    long = SamplingParams(max_tokens=8)
    decoding = [Sequence(0, "d", range(8), long)]
    of_flood, of_other = Sequence(1, "d", range(900), long), Sequence(2, "a", range(900), long)
    for seq in (*decoding, of_flood, of_other):
        waiting.add(seq)
    waiting.ran(decoding * 4000, 0)  # d has run, a has not
    within = waiting.prompt_tokens(decoding, [of_flood])
    assert within is not None and within < 900
    assert waiting.prompt_tokens(decoding, [of_flood, of_other]) == 900
    assert waiting.prompt_tokens([], [of_flood]) is None

"""Dividing bytes: against brute force where it can be had, and what any division must keep."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconsolidate.allocation import OPTIONS, Unit, allocate, options_for
from moeruntime.codes import PrivateCode, plane_bytes

ROWS, COLUMNS = 8, 64
BYTES = tuple(plane_bytes(ROWS, COLUMNS, option.bits) for option in OPTIONS)
MOST = max(option.bits for option in OPTIONS)


def unit(variants: Sequence[int], importance: Sequence[float], seed: int = 0) -> Unit:
    """Costs that fall about fourfold a bit, each member's with its own importance."""
    generator = torch.Generator().manual_seed(seed)
    bits_O = torch.tensor([float(option.bits) for option in OPTIONS])
    jitter_VO = 1 + 0.3 * torch.rand(len(variants), len(OPTIONS), generator=generator)
    costs_VO = torch.tensor(importance)[:, None] * 4.0**-bits_O * jitter_VO
    return Unit(300, BYTES, tuple(variants), costs_VO)


def random_units(num_units: int, num_variants: int, seed: int) -> list[Unit]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(num_units, num_variants, generator=generator)
    importance = (10.0 ** (-3 * spread) * 1e-3).tolist()
    return [unit(range(num_variants), row, seed + n) for n, row in enumerate(importance)]


def cost_of(units: Sequence[Unit], choices: Sequence[tuple[PrivateCode, ...]]) -> dict[int, float]:
    losses: dict[int, float] = {}
    for one, codes in zip(units, choices, strict=True):
        for v, (variant, code) in enumerate(zip(one.variants, codes, strict=True)):
            cost = float(one.costs_VO[v, OPTIONS.index(code)])
            losses[variant] = losses.get(variant, 0.0) + cost
    return losses


def bytes_of(units: Sequence[Unit], choices: Sequence[tuple[PrivateCode, ...]]) -> int:
    return sum(
        one.fixed_bytes + sum(one.bytes_O[OPTIONS.index(code)] for code in codes)
        for one, codes in zip(units, choices, strict=True)
    )


def limits(units: Sequence[Unit]) -> tuple[int, int]:
    least = sum(one.fixed_bytes for one in units)
    return least, least + sum(len(one.variants) * max(one.bytes_O) for one in units)


def test_every_option_can_be_stored_and_they_differ() -> None:
    assert all(option.valid() for option in OPTIONS)
    assert len(set(OPTIONS)) == len(OPTIONS)
    assert OPTIONS[0] == PrivateCode(0, 0)


@pytest.mark.parametrize("shared_bits", range(2, 7))
def test_options_fit_beside_any_shared_bits(shared_bits: int) -> None:
    options = options_for(shared_bits)
    assert all(option.valid() for option in options)
    assert len(set(options)) == len(options)
    assert options[0] == PrivateCode(0, 0)
    assert {option.bits for option in options} == {0, 1, 2, 3, 4}
    # Alone in its slot an expert wants plain uniform levels: the step of H cut evenly.
    step = 2 ** (7 - shared_bits)
    assert {PrivateCode(r, step >> r) for r in (1, 2, 3) if step >> r >= 1} <= set(options)
    if shared_bits == 4:
        assert options == OPTIONS


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.floats(0.0, 1.2), st.integers(0, 1000))
def test_a_budget_is_met(num_units: int, num_variants: int, part: float, seed: int) -> None:
    units = random_units(num_units, num_variants, seed)
    least, most = limits(units)
    budget = least + part * (most - least)
    chosen = allocate(units, num_variants, budget_bytes=budget)
    assert chosen.num_bytes <= budget
    assert chosen.num_bytes == bytes_of(units, chosen.choices)
    found = cost_of(units, chosen.choices)
    assert chosen.losses == pytest.approx([found[v] for v in range(num_variants)])


def test_a_budget_is_used() -> None:
    units = random_units(200, 2, 0)
    least, most = limits(units)
    for part in (0.1, 0.3, 0.5, 0.7, 0.9):
        budget = least + part * (most - least)
        chosen = allocate(units, 2, budget_bytes=budget)
        assert chosen.num_bytes > budget - 0.01 * (most - least)


@pytest.mark.parametrize("num_variants", [1, 3])
def test_more_bytes_never_lose_more(num_variants: int) -> None:
    units = random_units(40, num_variants, 1)
    least, most = limits(units)
    budgets = torch.linspace(least, most, 15).tolist()
    worst = [max(allocate(units, num_variants, budget_bytes=b).losses) for b in budgets]
    # Balancing variants is a heuristic; of a single one the loss falls at every step.
    slack = 1.0 if num_variants == 1 else 1.05
    for before, after in itertools.pairwise(worst):
        assert after <= before * slack + 1e-15
    assert worst[-1] < worst[0] / 100


def test_a_loss_is_met_and_more_loss_never_costs_more_bytes() -> None:
    units = random_units(40, 3, 2)
    tightest = max(allocate(units, 3, budget_bytes=limits(units)[1]).losses)
    loosest = max(allocate(units, 3, budget_bytes=limits(units)[0]).losses)
    sizes = []
    for step in range(1, 12, 2):
        wanted = tightest * (loosest / tightest) ** (step / 12)
        chosen = allocate(units, 3, max_loss=wanted)
        assert max(chosen.losses) <= wanted
        assert max(chosen.losses) > 0.5 * wanted  # and not much more is spent than is asked for
        sizes.append(chosen.num_bytes)
    for before, after in itertools.pairwise(sizes):
        assert after <= before * 1.02


def test_what_cannot_be_met_is_the_extreme() -> None:
    units = random_units(5, 2, 3)
    least, most = limits(units)
    assert allocate(units, 2, budget_bytes=least - 1).num_bytes == least
    assert all(
        code == PrivateCode(0, 0)
        for codes in allocate(units, 2, budget_bytes=0).choices
        for code in codes
    )
    chosen = allocate(units, 2, max_loss=1e-300)
    assert {code.bits for codes in chosen.choices for code in codes} == {MOST}
    assert chosen.num_bytes == most


@pytest.mark.parametrize("seed", range(2))
def test_tiny_problems_against_every_choice(seed: int) -> None:
    """Of one variant; a price finds the lower hull of the choices, so compare where it turns."""
    units = random_units(4, 1, seed)
    every = [
        (
            sum(one.fixed_bytes + one.bytes_O[o] for one, o in zip(units, picks, strict=True)),
            sum(float(one.costs_VO[0, o]) for one, o in zip(units, picks, strict=True)),
        )
        for picks in itertools.product(range(len(OPTIONS)), repeat=len(units))
    ]
    least, most = limits(units)
    for step in range(5):
        budget = least + step / 4 * (most - least)
        chosen = allocate(units, 1, budget_bytes=budget)
        # Nothing of the same size or smaller loses less.
        best = min(loss for size, loss in every if size <= chosen.num_bytes)
        assert chosen.losses[0] == pytest.approx(best, rel=1e-5)
        # And what is left unspent is less than the next private bit of one matrix.
        assert budget - chosen.num_bytes < max(BYTES)


def test_bits_go_where_they_matter() -> None:
    units = [unit([0], [1e-3]), unit([0], [1e-6])]
    least, most = limits(units)
    chosen = allocate(units, 1, budget_bytes=(least + most) // 2)
    first, second = (codes[0].bits for codes in chosen.choices)
    assert first > second


def test_the_variant_that_loses_most_is_protected() -> None:
    """The second variant's experts matter less each, and there are ten times as many."""
    spread = torch.rand(110, generator=torch.Generator().manual_seed(4)).tolist()
    units = [
        unit([int(n >= 10)], [(1e-3 if n < 10 else 3e-4) * 10 ** (-2 * u)], n)
        for n, u in enumerate(spread)
    ]
    least, most = limits(units)
    budget = least + 0.3 * (most - least)
    chosen = allocate(units, 2, budget_bytes=budget)
    alone = [Unit(one.fixed_bytes, one.bytes_O, (0,), one.costs_VO) for one in units]
    unprotected = [0.0, 0.0]
    for one, codes in zip(units, allocate(alone, 1, budget_bytes=budget).choices, strict=True):
        unprotected[one.variants[0]] += float(one.costs_VO[0, OPTIONS.index(codes[0])])
    assert max(unprotected) > 2 * min(unprotected)
    assert max(chosen.losses) < max(unprotected)


def test_variants_that_lose_nothing_take_nothing() -> None:
    costs = torch.stack([torch.zeros(len(OPTIONS)), unit([0], [1e-3]).costs_VO[0]])
    still = Unit(300, BYTES, (0, 1), costs)
    least, most = limits([still])
    chosen = allocate([still], 2, budget_bytes=(least + most) // 2)
    assert chosen.choices[0][0] == PrivateCode(0, 0)
    assert chosen.choices[0][1].bits == MOST
    assert chosen.losses[0] == 0.0

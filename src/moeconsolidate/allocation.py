"""How many bits each expert gets: the least predicted loss that a budget buys.

Every matrix of every expert of every variant chooses among the options below. For a price per byte
each choice is independent (the cheapest of cost + price * bytes), so bisecting the price meets the
budget: a Lagrangian relaxation. Costs of variants are then weighted towards the variant that loses
most, a few times over, so that no variant pays for the others.

Legend: U units (one matrix, gate_up or down, of one slot), V members of a slot, O options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeruntime.codes import PrivateCode

__all__ = ["OPTIONS", "Allocation", "Unit", "allocate", "options_for"]

OPTIONS: tuple[PrivateCode, ...] = tuple(
    PrivateCode(bits, step)
    for bits, step in (
        (0, 0),
        (1, 4),
        (1, 5),
        (1, 6),
        (2, 2),
        (2, 3),
        (2, 4),
        (3, 1),
        (3, 2),
        (4, 1),
    )
)
"""Private codes worth having beside shared codes of 4 bits, for any model."""


def options_for(shared_bits: int) -> tuple[PrivateCode, ...]:
    """The same beside shared codes of 2 to 6 bits: steps keep their ratio to a step of H."""
    scale = 2.0 ** (4 - shared_bits)
    return tuple(
        dict.fromkeys(
            PrivateCode(one.bits, max(1, round(one.step * scale)) if one.bits else 0)
            for one in OPTIONS
        )
    )


BALANCE_ROUNDS = 25
PRICE_BISECTIONS = 48


@dataclass(frozen=True, slots=True)
class Unit:
    """One matrix that members share.

    Attributes:
        fixed_bytes: bytes whatever is chosen: shared codes and scales.
        bytes_O: bytes of a member's private codes under each option.
        variants: index of each member's variant.
        costs_VO: predicted loss increase of each member under each option, nats per token.
    """

    fixed_bytes: int
    bytes_O: tuple[int, ...]
    variants: tuple[int, ...]
    costs_VO: Tensor


@dataclass(frozen=True, slots=True)
class Allocation:
    """The choice.

    Attributes:
        choices: for each unit, each member's private code.
        num_bytes: of all units.
        losses: predicted loss increase of each variant.
    """

    choices: list[tuple[PrivateCode, ...]]
    num_bytes: int
    losses: tuple[float, ...]


def allocate(
    units: Sequence[Unit],
    num_variants: int,
    *,
    budget_bytes: float | None = None,
    max_loss: float | None = None,
    options: Sequence[PrivateCode] = OPTIONS,
) -> Allocation:
    """Choose private codes for all units.

    Args:
        units: what can be chosen.
        num_variants: variants of the pack.
        budget_bytes: spend at most this on experts, losing least; or
        max_loss: predicted loss of the worst variant, spending least.
        options: what the units' bytes and costs are of.

    Returns:
        The allocation. If even no private bits exceed the budget, or the most bits exceed the loss,
        it is that extreme, and the caller compares.
    """
    assert (budget_bytes is None) != (max_loss is None)
    problem = _Problem(units, num_variants)
    balance_V = torch.ones(num_variants, dtype=torch.float64)
    for _ in range(BALANCE_ROUNDS):
        chosen = problem.meet(balance_V, budget_bytes, max_loss)
        losses_V = problem.losses(chosen)
        balance_V = 0.5 * balance_V + 0.5 * losses_V / losses_V.mean().clamp_min(1e-30)
    chosen = problem.meet(balance_V, budget_bytes, max_loss)
    choices: list[tuple[PrivateCode, ...]] = []
    start = 0
    for unit in units:
        stop = start + len(unit.variants)
        choices.append(tuple(options[idx] for idx in chosen[start:stop].tolist()))
        start = stop
    return Allocation(choices, problem.num_bytes(chosen), tuple(problem.losses(chosen).tolist()))


class _Problem:
    """All members of all units as rows M of flat tables."""

    def __init__(self, units: Sequence[Unit], num_variants: int) -> None:
        self._costs_MO = torch.cat([unit.costs_VO for unit in units]).double()
        self._variant_M = torch.tensor([v for unit in units for v in unit.variants])
        self._bytes_MO = torch.tensor(
            [unit.bytes_O for unit in units for _ in unit.variants], dtype=torch.float64
        )
        self._fixed_bytes = sum(unit.fixed_bytes for unit in units)
        self._num_variants = num_variants

    def num_bytes(self, chosen_M: Tensor) -> int:
        return self._fixed_bytes + int(self._bytes_MO.gather(1, chosen_M[:, None]).sum())

    def losses(self, chosen_M: Tensor) -> Tensor:
        costs_M = self._costs_MO.gather(1, chosen_M[:, None])[:, 0]
        zeros = torch.zeros(self._num_variants, dtype=torch.float64)
        return zeros.index_add(0, self._variant_M, costs_M)

    def meet(self, balance_V: Tensor, budget_bytes: float | None, max_loss: float | None) -> Tensor:
        """The choice at the price that just meets the bound."""
        weighted_MO = self._costs_MO * balance_V[self._variant_M][:, None]

        def at(exponent: float) -> Tensor:
            return (weighted_MO + 10**exponent * self._bytes_MO).argmin(dim=1)

        cheap, dear = -30.0, 3.0
        for _ in range(PRICE_BISECTIONS):
            middle = (cheap + dear) / 2
            chosen = at(middle)
            if budget_bytes is not None:
                affordable = self.num_bytes(chosen) <= budget_bytes
                cheap, dear = (cheap, middle) if affordable else (middle, dear)
            else:
                assert max_loss is not None
                good = float(self.losses(chosen).max()) <= max_loss
                cheap, dear = (middle, dear) if good else (cheap, middle)
        return at(dear if budget_bytes is not None else cheap)

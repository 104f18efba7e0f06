"""Levels of nested codes: the two that a place's members could share, and each member's own beside.

All of it is float32 with each operation rounded by itself.

Legend: V members of a slot, J places, each with a weight of every member.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeconsolidate.kernels.jit import floor, fused, kernel, nearest

__all__ = ["HALF", "ONE", "TINIEST", "ZERO", "nearest_codes", "quotient", "weigh"]

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
TINIEST = np.finfo(np.float32).tiny


@kernel
def weigh(
    targets_VJ: Any,
    importance_VJ: Any,
    total_J: Any,
    width: int,
    steps_V: Any,
    most_V: Any,
    most_shared: Any,
    shared_step: int,
    codes_2J: Any,
    errors_2J: Any,
) -> None:
    """Find the shared codes just below and above the members' mean, and the errors beside each.

    Args:
        targets_VJ: wanted, in units of the scale.
        importance_VJ, total_J: of each place, and its sum over members; None where all are 1.
        width: places.
        steps_V, most_V, most_shared, shared_step: the levels there are.
        codes_2J: filled: the lower and the higher shared code.
        errors_2J: filled: members' squared errors beside it, weighed by importance.
    """
    half, wide = most_shared * HALF, np.float32(shared_step)
    narrow = ONE / wide  # exact, since steps of shared codes are powers of two
    lowest, count = -half * wide, np.float32(len(targets_VJ))
    inverse = ONE / count
    for v in range(len(targets_VJ)):
        for j in range(width):
            wanted = _weighed(targets_VJ[v, j], importance_VJ, v, j)
            codes_2J[0, j] = codes_2J[0, j] + wanted if v else wanted
    for j in range(width):
        if total_J is None:
            mean = quotient(codes_2J[0, j], count, inverse)
        else:
            mean = codes_2J[0, j] / total_J[j]
        # Beyond these both are the last code anyway.
        below = floor(min(max(fused(mean, narrow, half), -ONE), most_shared))
        codes_2J[0, j] = max(below, ZERO)
        codes_2J[1, j] = min(below + ONE, most_shared)
    for v in range(len(targets_VJ)):
        step, last = steps_V[v], most_V[v]
        division = _division(step, last)
        for j in range(width):
            target = targets_VJ[v, j]
            low = _square(target, codes_2J[0, j], wide, lowest, step, last, division)
            high = _square(target, codes_2J[1, j], wide, lowest, step, last, division)
            low, high = _weighed(low, importance_VJ, v, j), _weighed(high, importance_VJ, v, j)
            errors_2J[0, j] = errors_2J[0, j] + low if v else low
            errors_2J[1, j] = errors_2J[1, j] + high if v else high


@kernel
def nearest_codes(
    targets_J: Any,
    shared_J: Any,
    step: Any,
    last: Any,
    most_shared: Any,
    shared_step: int,
    private_J: Any,
) -> None:
    """A member's best private codes beside shared ones."""
    wide = np.float32(shared_step)
    lowest = -most_shared * HALF * wide
    division = _division(step, last)
    for j in range(len(private_J)):
        private_J[j] = _code(targets_J[j] - fused(shared_J[j], wide, lowest), last, division)


@kernel
def quotient(dividend: Any, divisor: Any, inverse: Any) -> Any:
    """A quotient as division rounds it, by the divisor's rounded inverse (Markstein 1990).

    Three operations of one cycle, where a division takes a vector unit for many.
    """
    guess = dividend * inverse
    return fused(fused(-guess, divisor, dividend), inverse, guess)


@kernel
def _square(
    target: Any, shared: Any, wide: Any, lowest: Any, step: Any, last: Any, division: Any
) -> Any:
    """The square of what a member's nearest level misses beside a shared code."""
    base, middle = fused(shared, wide, lowest), division[0]
    code = _code(target - base, last, division)
    missed = target - fused(step, code, base - step * middle)  # levels are few and exact
    return missed * missed


@kernel
def _division(step: Any, last: Any) -> Any:
    """Middle of the private codes; divisor; its inverse, and whether products are quotients."""
    unit = max(step, ONE)
    return last * HALF, unit, ONE / unit, int(unit) & (int(unit) - 1) == 0


@kernel
def _code(distance: Any, last: Any, division: Any) -> Any:
    """The private code nearest to a distance from the shared level, ties to even."""
    middle, unit, inverse, exact = division
    if exact:
        wanted = fused(distance, inverse, middle)
    else:
        wanted = quotient(distance, unit, inverse) + middle
    return nearest(min(max(wanted, ZERO), last))


@kernel
def _weighed(value: Any, importance_VJ: Any, v: int, j: int) -> Any:
    """A place's value times its importance, which is 1 where there is none."""
    if importance_VJ is None:
        return value
    return value * importance_VJ[v, j]

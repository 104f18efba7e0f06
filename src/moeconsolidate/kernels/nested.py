"""Choosing nested levels: a scale a group, a shared code a place, a private code a member.

All of it is float32 with each operation rounded by itself.

Legend: N slots, V members of a slot, R rows, C columns, G scales a row, B columns of a batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moeconsolidate.kernels.jit import fused, kernel

__all__ = ["Scratch", "descend_columns", "feed_columns", "round_groups"]

LANES, CHAINS = 16, 4
"""A group's errors are added up as a vector unit of so many lanes does it, in so many chains."""

RUN = 1024
"""Columns of a row that are weighed at once, at least a group; a matter of speed alone."""

ROUNDER = np.float32(1.5 * 2**23)
"""Added and taken off again it rounds to the nearest integer, ties to even, below 2**22."""

ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
INFINITE, TINIEST = np.float32(np.inf), np.finfo(np.float32).tiny
MAGNITUDE = np.uint32(0x7FFFFFFF)
LEAST_WEIGHT = np.float32(2.0**-100)
"""Groups of nothing larger are scaled as if this were in them: no level is 0, so a group of zeros
comes out as small as this, and no scale rounds to 0."""


class Scratch(NamedTuple):
    """What `round_groups` works in: a run of columns of a row, of all members.

    Attributes:
        weights_VJ, importance_VJ, targets_VJ, total_J: of each place.
        weights_VGK, magnitudes_VGK, targets_VGK: the same memory, group by group, magnitudes as the
            integers that floats are.
        bases_2J, errors_2J: of the lower and of the higher shared code, level and errors.
        codes_J: chosen.
        blocks_GBK, rest_GK: the first errors, group by group, in blocks of CHAINS * LANES, and what
            is left over.
        lanes: partial sums.
        of_groups: unit, best and centre factor, least error, factor, scale and error of each group.
        number: one float.
        bits: the same, as an integer.
    """

    weights_VJ: Any
    importance_VJ: Any
    targets_VJ: Any
    total_J: Any
    weights_VGK: Any
    magnitudes_VGK: Any
    targets_VGK: Any
    bases_2J: Any
    codes_J: Any
    errors_2J: Any
    blocks_GBK: Any
    rest_GK: Any
    lanes: Any
    of_groups: Any
    number: Any
    bits: Any

    @classmethod
    def of(cls, num_members: int, group: int) -> Scratch:
        """Memory for a run: as many groups as RUN columns have, but at least one."""
        num_groups = max(1, RUN // group)
        by_group = (num_members, num_groups, group)
        run = num_groups * group
        weights_VJ, importance_VJ, targets_VJ = np.zeros((3, num_members, run), np.float32)
        errors_2J, number = np.zeros((2, run), np.float32), np.zeros(1, np.float32)
        errors_GK = errors_2J[0].reshape(num_groups, group)
        in_blocks = group // (CHAINS * LANES) * CHAINS * LANES
        return cls(
            weights_VJ,
            importance_VJ,
            targets_VJ,
            np.zeros(run, np.float32),
            weights_VJ.reshape(by_group),
            weights_VJ.view(np.uint32).reshape(by_group),
            targets_VJ.reshape(by_group),
            np.zeros((2, run), np.float32),
            np.zeros(run, np.float32),
            errors_2J,
            errors_GK[:, :in_blocks].reshape(num_groups, -1, CHAINS * LANES)
            if in_blocks
            else np.zeros((num_groups, 0, CHAINS * LANES), np.float32),
            errors_GK[:, in_blocks:],
            np.zeros(CHAINS * LANES, np.float32),
            np.zeros((7, num_groups), np.float32),
            number,
            number.view(np.uint32),
        )


@kernel
def round_groups(
    weights_NVRC: Any,
    outputs_NVR: Any,
    diagonal_NVC: Any,
    steps_NV: Any,
    most_NV: Any,
    shared_bits: int,
    shared_step: int,
    group: int,
    coarse: Any,
    fine: Any,
    scratch: Any,
    scale_NRG: Any,
    shared_NRC: Any,
    private_NVRC: Any,
) -> None:
    """Search each group's scale and, where there is room for them, choose its codes.

    Args:
        weights_NVRC: float32.
        outputs_NVR, diagonal_NVC: float32; an error's square is weighed with their product.
        steps_NV, most_NV: float32, the step and the largest of each member's private codes.
        shared_bits, shared_step: h and 2**(7 - h).
        group: columns a scale.
        coarse, fine: float32, factors that are tried, and offsets to the best of them.
        scratch: for so many members and such groups.
        scale_NRG: float32, filled with what bfloat16 can hold.
        shared_NRC, private_NVRC: uint8, filled with the nearest codes; empty where only scales are
            wanted.
    """
    num_slots, num_members, num_rows, num_columns = weights_NVRC.shape
    most_shared = np.float32((1 << shared_bits) - 1)
    span = np.float32(shared_step << shared_bits) * HALF
    weights, importance, total = scratch.weights_VJ, scratch.importance_VJ, scratch.total_J
    weights_VGK, targets_VGK = scratch.weights_VGK, scratch.targets_VGK
    bases, codes, errors = scratch.bases_2J, scratch.codes_J, scratch.errors_2J
    unit, best, centre, least, factor, scale, error = scratch.of_groups
    number, bits = scratch.number, scratch.bits
    num_coarse, num_factors = len(coarse), len(coarse) + len(fine)
    run = weights.shape[1]
    for n in range(num_slots):
        for r in range(num_rows):
            for first in range(0, num_columns, run):
                width = min(run, num_columns - first)
                num_groups = -(-width // group)
                weights[:, width:] = ZERO
                for v in range(num_members):
                    row_C = weights_NVRC[n, v, r, first : first + width]
                    for j in range(width):
                        weights[v, j] = row_C[j]
                if outputs_NVR is not None:
                    total[:] = ZERO
                    for v in range(num_members):
                        of_output = outputs_NVR[n, v, r]
                        of_inputs_C = diagonal_NVC[n, v, first : first + width]
                        for j in range(width):
                            importance[v, j] = of_output * of_inputs_C[j]
                            total[j] += importance[v, j]
                    for j in range(width):
                        total[j] = max(total[j], TINIEST)
                for g in range(num_groups):
                    largest = np.uint32(0)  # floats without their signs are in order as integers
                    for v in range(num_members):
                        for k in range(group):
                            largest = max(largest, scratch.magnitudes_VGK[v, g, k] & MAGNITUDE)
                    bits[0] = largest
                    unit[g], least[g] = max(number[0], LEAST_WEIGHT) / span, INFINITE
                for attempt in range(num_factors + 1):  # the last is the best once more
                    for g in range(num_groups):
                        if attempt == num_coarse:
                            centre[g] = best[g]
                        if attempt < num_coarse:
                            factor[g] = coarse[attempt]
                        elif attempt < num_factors:
                            factor[g] = centre[g] + fine[attempt - num_coarse]
                        else:
                            factor[g] = best[g]
                        number[0] = unit[g] * factor[g]  # as bfloat16: nearest, ties to even
                        bits[0] = (bits[0] + 0x7FFF + ((bits[0] >> 16) & 1)) & 0xFFFF0000
                        scale[g] = number[0]
                    if attempt == num_factors and not shared_NRC.size:
                        break
                    for v in range(num_members):
                        for g in range(num_groups):
                            divisor, inverse = scale[g], ONE / scale[g]
                            for k in range(group):
                                targets_VGK[v, g, k] = _quotient(
                                    weights_VGK[v, g, k], divisor, inverse
                                )
                    if outputs_NVR is None:
                        _weigh(
                            scratch.targets_VJ, None, None, width, steps_NV[n], most_NV[n],
                            most_shared, shared_step, bases, errors,
                        )  # fmt: skip
                    else:
                        _weigh(
                            scratch.targets_VJ, importance, total, width, steps_NV[n], most_NV[n],
                            most_shared, shared_step, bases, errors,
                        )  # fmt: skip
                    if attempt == num_factors:
                        break
                    for j in range(width):
                        errors[0, j] = min(errors[0, j], errors[1, j])
                    errors[0, width:] = ZERO
                    _sum_groups(scratch.blocks_GBK, scratch.rest_GK, scratch.lanes, error)
                    for g in range(num_groups):
                        weighed = error[g] * (scale[g] * scale[g])
                        if weighed < least[g]:
                            best[g], least[g] = factor[g], weighed
                for g in range(num_groups):
                    scale_NRG[n, r, first // group + g] = scale[g]
                if shared_NRC.size:
                    _choose(bases, errors, width, most_shared, shared_step, codes)
                    found_C = shared_NRC[n, r, first : first + width]
                    for j in range(width):
                        found_C[j] = np.uint8(np.int32(codes[j]))
                    for v in range(num_members):
                        _nearest(
                            scratch.targets_VJ[v], bases[0], steps_NV[n, v], most_NV[n, v],
                            codes[:width],
                        )  # fmt: skip
                        found_C = private_NVRC[n, v, r, first : first + width]
                        for j in range(width):
                            found_C[j] = np.uint8(np.int32(codes[j]))


@kernel
def feed_columns(
    left_NVBR: Any,
    scale_NBR: Any,
    pivots_NVB: Any,
    feedback_NVBB: Any,
    outputs_NVR: Any,
    steps_NV: Any,
    most_NV: Any,
    shared_bits: int,
    shared_step: int,
    levels_NVBR: Any,
    shared_NBR: Any,
    private_NVBR: Any,
    errors_NVBR: Any,
) -> None:
    """Choose a batch of columns one by one, feeding each one's error into those that follow.

    Args:
        left_NVBR: float32, what is wanted of each column; errors are taken off.
        scale_NBR: float32, each place's scale.
        pivots_NVB, feedback_NVBB: float32, diagonal and rows of U.
        outputs_NVR: float32, the importance of each output.
        steps_NV, most_NV, shared_bits, shared_step: as of `round_groups`.
        levels_NVBR, shared_NBR, private_NVBR, errors_NVBR: float32, filled: levels, codes, and what
            is missed of each column, divided by its pivot.
    """
    num_slots, num_members, num_columns, num_rows = left_NVBR.shape
    most_shared = np.float32((1 << shared_bits) - 1)
    importance, wanted, targets = np.empty((3, num_members, num_rows), np.float32)
    total = np.empty(num_rows, np.float32)
    bases, errors = np.empty((2, 2, num_rows), np.float32)
    for n in range(num_slots):
        for c in range(num_columns):
            scale = scale_NBR[n, c]
            total[:] = ZERO
            for v in range(num_members):
                pivot = pivots_NVB[n, v, c]
                square = pivot * pivot
                of_row, of_outputs = importance[v], outputs_NVR[n, v]
                row, left = wanted[v], left_NVBR[n, v, c]
                for r in range(num_rows):
                    of_row[r] = of_outputs[r] / square
                    total[r] += of_row[r]
                    row[r] = left[r]
            _choose_column(
                wanted, importance, total, scale, steps_NV[n], most_NV[n], most_shared,
                shared_step, targets, bases, errors,
                levels_NVBR[n, :, c], shared_NBR[n, c], private_NVBR[n, :, c],
            )  # fmt: skip
            for v in range(num_members):
                pivot = pivots_NVB[n, v, c]
                error, level, row = errors_NVBR[n, v, c], levels_NVBR[n, v, c], wanted[v]
                for r in range(num_rows):
                    error[r] = (row[r] - level[r] * scale[r]) / pivot
                for later in range(c + 1, num_columns):
                    factor, left = feedback_NVBB[n, v, c, later], left_NVBR[n, v, later]
                    for r in range(num_rows):
                        left[r] -= factor * error[r]


@kernel
def descend_columns(
    slope_NVBR: Any,
    scale_NBR: Any,
    inputs_NVBB: Any,
    outputs_NVR: Any,
    steps_NV: Any,
    most_NV: Any,
    shared_bits: int,
    shared_step: int,
    levels_NVBR: Any,
    shared_NBR: Any,
    private_NVBR: Any,
    moves_NVBR: Any,
) -> None:
    """Move a batch of columns one by one to where the cost is least, all others staying.

    Args:
        slope_NVBR: float32, half the cost's gradient by unit of output importance, kept up to date.
        scale_NBR, outputs_NVR, steps_NV, most_NV, shared_bits, shared_step: as of `feed_columns`.
        inputs_NVBB: float32, A between these columns.
        levels_NVBR, shared_NBR, private_NVBR: float32, changed.
        moves_NVBR: float32, filled with what each weight has moved.
    """
    num_slots, num_members, num_columns, num_rows = slope_NVBR.shape
    most_shared = np.float32((1 << shared_bits) - 1)
    importance, wanted, targets = np.empty((3, num_members, num_rows), np.float32)
    total = np.empty(num_rows, np.float32)
    bases, errors = np.empty((2, 2, num_rows), np.float32)
    for n in range(num_slots):
        for c in range(num_columns):
            scale = scale_NBR[n, c]
            total[:] = ZERO
            for v in range(num_members):
                curvature = inputs_NVBB[n, v, c, c]
                of_row, of_outputs, row = importance[v], outputs_NVR[n, v], wanted[v]
                level, move, slope = levels_NVBR[n, v, c], moves_NVBR[n, v, c], slope_NVBR[n, v, c]
                for r in range(num_rows):
                    of_row[r] = of_outputs[r] * curvature
                    total[r] += of_row[r]
                    move[r] = level[r] * scale[r]
                    row[r] = move[r] - slope[r] / curvature
            _choose_column(
                wanted, importance, total, scale, steps_NV[n], most_NV[n], most_shared,
                shared_step, targets, bases, errors,
                levels_NVBR[n, :, c], shared_NBR[n, c], private_NVBR[n, :, c],
            )  # fmt: skip
            for v in range(num_members):
                level, move = levels_NVBR[n, v, c], moves_NVBR[n, v, c]
                for r in range(num_rows):
                    move[r] = level[r] * scale[r] - move[r]
                for other in range(num_columns):
                    factor, slope = inputs_NVBB[n, v, other, c], slope_NVBR[n, v, other]
                    for r in range(num_rows):
                        slope[r] += factor * move[r]


@kernel
def _choose_column(
    wanted_VR: Any,
    importance_VR: Any,
    total_R: Any,
    scale_R: Any,
    steps_V: Any,
    most_V: Any,
    most_shared: Any,
    shared_step: int,
    targets_VR: Any,
    bases_2R: Any,
    errors_2R: Any,
    levels_VR: Any,
    shared_R: Any,
    private_VR: Any,
) -> None:
    """Choose levels and codes of one column, whose rows have a scale each."""
    num_members, num_rows = wanted_VR.shape
    for r in range(num_rows):
        total_R[r] = max(total_R[r], TINIEST)
    for v in range(num_members):
        for r in range(num_rows):
            targets_VR[v, r] = wanted_VR[v, r] / scale_R[r]
    _weigh(
        targets_VR, importance_VR, total_R, num_rows, steps_V, most_V, most_shared, shared_step,
        bases_2R, errors_2R,
    )  # fmt: skip
    _choose(bases_2R, errors_2R, num_rows, most_shared, shared_step, shared_R)
    for v in range(num_members):
        _nearest(targets_VR[v], bases_2R[0], steps_V[v], most_V[v], private_VR[v])
        step, middle = steps_V[v], most_V[v] * HALF
        for r in range(num_rows):
            levels_VR[v, r] = bases_2R[0, r] + step * (private_VR[v, r] - middle)


@kernel
def _weigh(
    targets_VJ: Any,
    importance_VJ: Any,
    total_J: Any,
    width: int,
    steps_V: Any,
    most_V: Any,
    most_shared: Any,
    shared_step: int,
    bases_2J: Any,
    errors_2J: Any,
) -> None:
    """Find the shared levels just below and above the members' mean, and the errors beside each.

    Args:
        targets_VJ: wanted, in units of the scale.
        importance_VJ, total_J: of each place, and its sum over members; None where all are 1.
        width: places.
        steps_V, most_V, most_shared, shared_step: the levels there are.
        bases_2J: filled: the lower and the higher shared level.
        errors_2J: filled: members' squared errors beside it, weighed by importance.
    """
    half, wide = most_shared * HALF, np.float32(shared_step)
    narrow = ONE / wide  # exact, since steps of shared codes are powers of two
    lowest, count = -half * wide, np.float32(len(targets_VJ))
    inverse = ONE / count
    for j in range(width):
        bases_2J[0, j] = _weighed(targets_VJ[0, j], importance_VJ, 0, j)
    for v in range(1, len(targets_VJ)):
        for j in range(width):
            bases_2J[0, j] += _weighed(targets_VJ[v, j], importance_VJ, v, j)
    for j in range(width):
        if total_J is None:
            mean = _quotient(bases_2J[0, j], count, inverse)
        else:
            mean = bases_2J[0, j] / total_J[j]
        # Beyond these both are the last code anyway, and the rounding below holds.
        place = min(max(mean * narrow + half, -ONE), most_shared)
        floor = (place + ROUNDER) - ROUNDER
        level = (floor - ONE if floor > place else floor) * wide + lowest
        bases_2J[0, j] = max(level, lowest)
        bases_2J[1, j] = min(level + wide, -lowest)
        errors_2J[0, j] = ZERO
        errors_2J[1, j] = ZERO
    for v in range(len(targets_VJ)):
        step, last = steps_V[v], most_V[v]
        middle, unit, inverse, exact = _division(step, last)
        below = -step * middle
        for side in range(2):
            for j in range(width):
                target, base = targets_VJ[v, j], bases_2J[side, j]
                code = _code(target - base, middle, last, unit, inverse, exact)
                missed = target - fused(step, code, base + below)
                errors_2J[side, j] += _weighed(missed * missed, importance_VJ, v, j)


@kernel
def _choose(
    bases_2J: Any,
    errors_2J: Any,
    width: int,
    most_shared: Any,
    shared_step: int,
    shared_J: Any,
) -> None:
    """Put the better shared level first, and say which code it is."""
    half, narrow = most_shared * HALF, ONE / np.float32(shared_step)
    for j in range(width):
        low, high = bases_2J[0, j], bases_2J[1, j]
        bases_2J[0, j] = high if errors_2J[1, j] < errors_2J[0, j] else low
    for j in range(width):
        shared_J[j] = bases_2J[0, j] * narrow + half


@kernel
def _nearest(targets_J: Any, bases_J: Any, step: Any, last: Any, private_J: Any) -> None:
    """A member's best private codes beside shared levels."""
    middle, unit, inverse, exact = _division(step, last)
    for j in range(len(private_J)):
        private_J[j] = _code(targets_J[j] - bases_J[j], middle, last, unit, inverse, exact)


@kernel
def _division(step: Any, last: Any) -> Any:
    """Middle of the private codes; divisor; its inverse, and whether products are quotients."""
    unit = max(step, ONE)
    return last * HALF, unit, ONE / unit, int(unit) & (int(unit) - 1) == 0


@kernel
def _code(distance: Any, middle: Any, last: Any, unit: Any, inverse: Any, exact: Any) -> Any:
    """The private code nearest to a distance from the shared level, ties to even."""
    if exact:
        wanted = fused(distance, inverse, middle)
    else:
        wanted = _quotient(distance, unit, inverse) + middle
    return (min(max(wanted, ZERO), last) + ROUNDER) - ROUNDER


@kernel
def _quotient(dividend: Any, divisor: Any, inverse: Any) -> Any:
    """A quotient as division rounds it, by the divisor's rounded inverse (Markstein 1990).

    Three operations of one cycle, where a division takes a vector unit for many.
    """
    guess = dividend * inverse
    return fused(fused(-guess, divisor, dividend), inverse, guess)


@kernel
def _weighed(value: Any, importance_VJ: Any, v: int, j: int) -> Any:
    """A place's value times its importance, which is 1 where there is none."""
    if importance_VJ is None:
        return value
    return value * importance_VJ[v, j]


@kernel
def _sum_groups(blocks_GBK: Any, rest_GK: Any, lanes: Any, sums_G: Any) -> None:
    """Add up each group's errors.

    Args:
        blocks_GBK: float32, a group's errors in blocks of CHAINS * LANES.
        rest_GK: those left over.
        lanes: scratch of CHAINS * LANES.
        sums_G: filled.
    """
    num_groups, num_blocks, _ = blocks_GBK.shape
    num_rest = rest_GK.shape[1]
    for g in range(num_groups):
        lanes[:] = ZERO
        for block in range(num_blocks):
            for k in range(CHAINS * LANES):
                lanes[k] += blocks_GBK[g, block, k]
        for k in range(num_rest // LANES * LANES):
            lanes[k % LANES] += rest_GK[g, k]
        for k in range(LANES):
            lanes[k] = ((lanes[k] + lanes[k + LANES]) + lanes[k + 2 * LANES]) + lanes[k + 3 * LANES]
        total = ZERO
        for k in range(num_rest // LANES * LANES, num_rest):
            total += rest_GK[g, k]
        for k in range(LANES):
            total += lanes[k]
        sums_G[g] = total

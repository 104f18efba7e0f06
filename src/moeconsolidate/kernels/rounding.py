"""Rounding to nested levels: a scale a group, a shared code a place, a private code a member.

All of it is float32 with each operation rounded by itself.

Legend: N slots, V members of a slot, R rows, C columns, G scales a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from moeconsolidate.kernels.jit import kernel
from moeconsolidate.kernels.levels import (
    HALF,
    ONE,
    TINIEST,
    ZERO,
    nearest_codes,
    quotient,
    weigh,
)

__all__ = ["Scratch", "round_groups"]

LANES, CHAINS = 16, 4
"""A group's errors are added up as a vector unit of so many lanes does it, in so many chains."""

BLOCK = CHAINS * LANES

RUN = 1024
"""Columns of a row that are weighed at once, at least a group; a matter of speed alone."""

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
        codes_2J, errors_2J: the lower and the higher shared code, and the errors beside each.
        shared_J, private_J: codes that are chosen.
        codes_2GK, errors_2GK, shared_GK: the same memory, group by group.
        blocks_2GBK, rest_2GK: the same errors, in blocks of so many lanes, and what is left over.
        lanes_GK: partial sums.
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
    codes_2J: Any
    errors_2J: Any
    shared_J: Any
    private_J: Any
    codes_2GK: Any
    errors_2GK: Any
    shared_GK: Any
    blocks_2GBK: Any
    rest_2GK: Any
    lanes_GK: Any
    of_groups: Any
    number: Any
    bits: Any

    @classmethod
    def of(cls, num_members: int, group: int) -> Scratch:
        """Memory for a run: as many groups as RUN columns have, but at least one."""
        num_groups = max(1, RUN // group)
        run = num_groups * group
        by_group = (-1, num_groups, group)
        # Of torch, since a vector that lies across two lines of the cache takes twice as long.
        weights_VJ, importance_VJ, targets_VJ = torch.zeros(3, num_members, run).numpy()
        codes_2J, errors_2J = torch.zeros(2, 2, run).numpy()
        total_J, shared_J, private_J = torch.zeros(3, run).numpy()
        errors_2GK, in_blocks = errors_2J.reshape(by_group), group // BLOCK * BLOCK
        number = np.zeros(1, np.float32)
        return cls(
            weights_VJ,
            importance_VJ,
            targets_VJ,
            total_J,
            weights_VJ.reshape(by_group),
            weights_VJ.view(np.uint32).reshape(by_group),
            targets_VJ.reshape(by_group),
            codes_2J,
            errors_2J,
            shared_J,
            private_J,
            codes_2J.reshape(by_group),
            errors_2GK,
            shared_J.reshape(by_group[1:]),
            errors_2GK[:, :, :in_blocks].reshape(2, num_groups, in_blocks // BLOCK, BLOCK),
            errors_2GK[:, :, in_blocks:],
            torch.zeros(num_groups, BLOCK).numpy(),
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
    targets, shared, private = scratch.targets_VJ, scratch.shared_J, scratch.private_J
    codes, errors = scratch.codes_2J, scratch.errors_2J
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
                errors[:, width:] = ZERO
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
                    unit[g] = max(number[0], LEAST_WEIGHT) / span
                for attempt in range(num_factors):
                    for g in range(num_groups):
                        if attempt == num_coarse:
                            centre[g] = best[g]
                        if attempt < num_coarse:
                            factor[g] = coarse[attempt]
                        else:
                            factor[g] = centre[g] + fine[attempt - num_coarse]
                    _scale(unit, factor, num_groups, number, bits, scale)
                    _divide(scratch.weights_VGK, scale, num_groups, scratch.targets_VGK)
                    if outputs_NVR is None:
                        weigh(
                            targets, None, None, width, steps_NV[n], most_NV[n],
                            most_shared, shared_step, codes, errors,
                        )  # fmt: skip
                    else:
                        weigh(
                            targets, importance, total, width, steps_NV[n], most_NV[n],
                            most_shared, shared_step, codes, errors,
                        )  # fmt: skip
                    _sum_groups(
                        scratch.blocks_2GBK, scratch.rest_2GK, num_groups, scratch.lanes_GK, error
                    )
                    _keep(
                        attempt == 0, scratch.codes_2GK, scratch.errors_2GK, num_groups, factor,
                        scale, error, best, least, scratch.shared_GK,
                    )  # fmt: skip
                _scale(unit, best, num_groups, number, bits, scale)
                for g in range(num_groups):
                    scale_NRG[n, r, first // group + g] = scale[g]
                if shared_NRC.size:
                    found_C = shared_NRC[n, r, first : first + width]
                    for j in range(width):
                        found_C[j] = np.uint8(np.int32(shared[j]))
                    _divide(scratch.weights_VGK, scale, num_groups, scratch.targets_VGK)
                    for v in range(num_members):
                        nearest_codes(
                            targets[v], shared, steps_NV[n, v], most_NV[n, v], most_shared,
                            shared_step, private[:width],
                        )  # fmt: skip
                        found_C = private_NVRC[n, v, r, first : first + width]
                        for j in range(width):
                            found_C[j] = np.uint8(np.int32(private[j]))


@kernel
def _scale(
    unit_G: Any, factor_G: Any, num_groups: int, number: Any, bits: Any, scale_G: Any
) -> None:
    """Products of unit and factor as bfloat16: nearest, ties to even."""
    for g in range(num_groups):
        number[0] = unit_G[g] * factor_G[g]
        bits[0] = (bits[0] + 0x7FFF + ((bits[0] >> 16) & 1)) & 0xFFFF0000
        scale_G[g] = number[0]


@kernel
def _divide(weights_VGK: Any, scale_G: Any, num_groups: int, targets_VGK: Any) -> None:
    """Weights in units of their group's scale."""
    num_members, _, group = weights_VGK.shape
    for v in range(num_members):
        for g in range(num_groups):
            divisor, inverse = scale_G[g], ONE / scale_G[g]
            for k in range(group):
                targets_VGK[v, g, k] = quotient(weights_VGK[v, g, k], divisor, inverse)


@kernel
def _sum_groups(
    blocks_2GBK: Any, rest_2GK: Any, num_groups: int, lanes_GK: Any, sums_G: Any
) -> None:
    """Add up the lesser error of each place of a group.

    Args:
        blocks_2GBK: float32, a group's errors in blocks of BLOCK.
        rest_2GK: those left over.
        num_groups: how many of them.
        lanes_GK: scratch of BLOCK a group.
        sums_G: filled.
    """
    num_blocks, num_rest = blocks_2GBK.shape[2], rest_2GK.shape[2]
    for g in range(num_groups):
        for k in range(BLOCK):
            lanes_GK[g, k] = ZERO
        for block in range(num_blocks):
            for k in range(BLOCK):
                lanes_GK[g, k] += min(blocks_2GBK[0, g, block, k], blocks_2GBK[1, g, block, k])
        for k in range(num_rest // LANES * LANES):
            lanes_GK[g, k % LANES] += min(rest_2GK[0, g, k], rest_2GK[1, g, k])
        total = ZERO
        for k in range(num_rest // LANES * LANES, num_rest):
            total += min(rest_2GK[0, g, k], rest_2GK[1, g, k])
        for k in range(LANES):
            half = lanes_GK[g, k] + lanes_GK[g, k + LANES]
            total += (half + lanes_GK[g, k + 2 * LANES]) + lanes_GK[g, k + 3 * LANES]
        sums_G[g] = total


@kernel
def _keep(
    first: bool,
    codes_2GK: Any,
    errors_2GK: Any,
    num_groups: int,
    factor_G: Any,
    scale_G: Any,
    error_G: Any,
    best_G: Any,
    least_G: Any,
    shared_GK: Any,
) -> None:
    """Where a factor is the first or better than those before, keep it and each place's code."""
    group = shared_GK.shape[1]
    for g in range(num_groups):
        weighed = error_G[g] * (scale_G[g] * scale_G[g])
        if first or weighed < least_G[g]:
            best_G[g], least_G[g] = factor_G[g], weighed
            for k in range(group):
                low, high = codes_2GK[0, g, k], codes_2GK[1, g, k]
                shared_GK[g, k] = high if errors_2GK[1, g, k] < errors_2GK[0, g, k] else low

"""Choosing nested codes column by column, each column's errors fed into others.

All of it is float32 with each operation rounded by itself.

Legend: N slots, V members of a slot, R rows, C columns, B columns of a batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeconsolidate.kernels.jit import kernel
from moeconsolidate.kernels.levels import HALF, TINIEST, ZERO, nearest_codes, weigh

__all__ = ["descend_columns", "feed_columns"]


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
    codes, errors = np.empty((2, 2, num_rows), np.float32)
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
                shared_step, targets, codes, errors,
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
    codes, errors = np.empty((2, 2, num_rows), np.float32)
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
                shared_step, targets, codes, errors,
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
    codes_2R: Any,
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
    weigh(
        targets_VR, importance_VR, total_R, num_rows, steps_V, most_V, most_shared, shared_step,
        codes_2R, errors_2R,
    )  # fmt: skip
    for r in range(num_rows):
        low, high = codes_2R[0, r], codes_2R[1, r]
        shared_R[r] = high if errors_2R[1, r] < errors_2R[0, r] else low
    wide = np.float32(shared_step)
    for v in range(num_members):
        nearest_codes(
            targets_VR[v], shared_R, steps_V[v], most_V[v], most_shared, shared_step, private_VR[v]
        )
        step, middle = steps_V[v], most_V[v] * HALF
        for r in range(num_rows):
            base = (shared_R[r] - most_shared * HALF) * wide
            levels_VR[v, r] = base + step * (private_VR[v, r] - middle)

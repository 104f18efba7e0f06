"""Dot products of many rows with each other. Legend: E (rows), C (columns)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from moeconsolidate.kernels.jit import kernel

__all__ = ["add_products"]

BLOCK_COLUMNS = 512
"""Columns whose products are added up in float32, in a few dozen partial sums; they stay in the
first cache for as many rows as fit there."""

ZERO = np.float32(0)


@kernel
def add_products(rows_EC: Any, gram_EE: Any) -> None:
    """Add each two rows' products to `gram_EE`, on and above its diagonal, and somewhat below.

    Args:
        rows_EC: float32.
        gram_EE: float64.
    """
    num_rows, num_columns = rows_EC.shape
    for start in range(0, num_columns, BLOCK_COLUMNS):
        stop = start + BLOCK_COLUMNS
        for i in range(0, num_rows, 2):
            next_i = min(i + 1, num_rows - 1)
            for j in range(i, num_rows, 2):
                next_j = min(j + 1, num_rows - 1)
                first, second, third, fourth = _products(
                    rows_EC[i, start:stop],
                    rows_EC[next_i, start:stop],
                    rows_EC[j, start:stop],
                    rows_EC[next_j, start:stop],
                )
                gram_EE[i, j] += first
                if next_j > j:
                    gram_EE[i, next_j] += second
                if next_i > i:
                    gram_EE[next_i, j] += third
                if next_i > i and next_j > j:
                    gram_EE[next_i, next_j] += fourth


@partial(kernel, reassociate=True)  # what is asked of a similarity is less than its last digit
def _products(a_C: Any, b_C: Any, c_C: Any, d_C: Any) -> Any:
    """The sums a c, a d, b c and b d at once, so that each number is loaded for two."""
    ac = ad = bc = bd = ZERO
    for k in range(len(a_C)):
        ac += a_C[k] * c_C[k]
        ad += a_C[k] * d_C[k]
        bc += b_C[k] * c_C[k]
        bd += b_C[k] * d_C[k]
    return ac, ad, bc, bd

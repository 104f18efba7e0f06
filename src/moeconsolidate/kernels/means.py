"""Means of bfloat16 weights, which are uint16 here. Legend: C (weights of a run)."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeconsolidate.kernels.jit import kernel

__all__ = ["add_bfloat16", "mean_bfloat16"]

RUN = 2048
"""Weights that are widened at once, in the first cache."""


@kernel
def add_bfloat16(sum_C: Any, member_C: Any, first: bool) -> None:
    """Add a member to float32 sums or, if it is the first, begin with it."""
    wide = np.empty(RUN, np.float32)
    bits = wide.view(np.uint32)
    for start in range(0, len(member_C), RUN):
        member, sums = member_C[start : start + RUN], sum_C[start : start + RUN]
        for j in range(len(member)):
            bits[j] = np.uint32(member[j]) << 16
        if first:  # not added to zero, which would lose the sign of -0.0
            for j in range(len(member)):
                sums[j] = wide[j]
        else:
            for j in range(len(member)):
                sums[j] += wide[j]


@kernel
def mean_bfloat16(sum_C: Any, count: int, out_C: Any) -> None:
    """Divide sums, which are not NaN, by their count, and round to nearest, ties to even."""
    mean = np.empty(RUN, np.float32)
    mean_bits, divisor = mean.view(np.uint32), np.float32(count)
    for start in range(0, len(out_C), RUN):
        sums, out = sum_C[start : start + RUN], out_C[start : start + RUN]
        for j in range(len(out)):
            mean[j] = sums[j] / divisor
        for j in range(len(out)):
            bits = mean_bits[j]
            out[j] = np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)

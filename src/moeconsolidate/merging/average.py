"""Plain averaging of weights.

The uniform soup of Wortsman et al., "Model soups" (2022), https://arxiv.org/abs/2203.05482, applied
to the experts of a slot instead of to whole models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moeconsolidate.merging.base import CHUNK_ELEMENTS, MergeRule, SlotContext, combine_columns

__all__ = ["Average"]


class Average(MergeRule):
    """The mean of the members.

    Sums are taken in the members' order, in a type that holds any sum of equal weights exactly:
    identical members come out bit by bit.
    """

    def __call__(self, members: Sequence[Tensor], context: SlotContext, *, out: Tensor) -> Tensor:
        if len(members) == 1:
            return members[0]
        if out.dtype == torch.bfloat16:
            return _mean_bfloat16(members, out)
        return combine_columns(members, out, _mean)


def _mean_bfloat16(members: Sequence[Tensor], out: Tensor) -> Tensor:
    """`_mean` where it is wanted most, in compiled loops."""
    from moeconsolidate.kernels.means import add_bfloat16, mean_bfloat16

    *rows, out_P = (row.view(torch.uint16).numpy() for row in (*members, out))
    sum_C = np.empty(min(CHUNK_ELEMENTS, len(out_P)), np.float32)
    for start in range(0, len(out_P), CHUNK_ELEMENTS):
        columns = slice(start, start + CHUNK_ELEMENTS)
        for number, row_P in enumerate(rows):
            add_bfloat16(sum_C, row_P[columns], number == 0)
        mean_bfloat16(sum_C, len(rows), out_P[columns])
    return out


def _mean(rows_MC: Tensor) -> Tensor:
    # Starting from the first member rather than from zero keeps the sign of -0.0.
    sum_C, *rest = rows_MC.unbind()
    for row_C in rest:
        sum_C += row_C
    return sum_C.div_(len(rows_MC))

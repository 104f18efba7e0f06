"""Plain averaging of weights.

The uniform soup of Wortsman et al., "Model soups" (2022), https://arxiv.org/abs/2203.05482, applied
to the experts of a slot instead of to whole models.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moeconsolidate.merging.base import MergeRule, SlotContext, combine_columns

__all__ = ["Average"]


class Average(MergeRule):
    """The mean of the members.

    Sums are taken in the members' order, in a type that holds any sum of equal weights exactly:
    identical members come out bit by bit.
    """

    def __call__(self, members: Sequence[Tensor], context: SlotContext, *, out: Tensor) -> Tensor:
        return members[0] if len(members) == 1 else combine_columns(members, out, _mean)


def _mean(rows_MC: Tensor) -> Tensor:
    # Starting from the first member rather than from zero keeps the sign of -0.0.
    sum_C, *rest = rows_MC.unbind()
    for row_C in rest:
        sum_C += row_C
    return sum_C.div_(len(rows_MC))

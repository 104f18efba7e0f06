"""Averaging by use: an expert counts as much as its router uses it.

The merging step of Li et al., "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its
Routing Policy" (2023), https://arxiv.org/abs/2310.01334. Its alignment of neurons comes before any
rule, where the recipe asks for it: variants of one ancestor do not need it. A member's weight is
the part of its own variant's calibration tokens that were routed to it; where nothing was, members
weigh alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeconsolidate.merging.base import MergeRule, SlotContext, combine_columns

__all__ = ["FrequencyWeighted"]


class FrequencyWeighted(MergeRule):
    """The mean of the members, weighted by how often they are used."""

    @property
    def needs_statistics(self) -> bool:
        return True

    def __call__(self, members: Sequence[Tensor], context: SlotContext, *, out: Tensor) -> Tensor:
        if len(members) == 1:
            return members[0]
        weight_M = _frequencies(context)

        def combine(rows_MC: Tensor) -> Tensor:
            # About the first member, so that identical ones come out bit by bit.
            merged_C, *rest = rows_MC.unbind()
            moves = [row_C.sub_(merged_C) for row_C in rest]
            for weight, move_C in zip(weight_M[1:].tolist(), moves, strict=True):
                merged_C.add_(move_C, alpha=weight)
            return merged_C

        return combine_columns(members, out, combine)


def _frequencies(context: SlotContext) -> Tensor:
    """Weights of the members, float64, that sum to 1."""
    assert context.statistics is not None
    used_M = torch.tensor(
        [
            float(one.num_routed_LE[context.layer, ref.expert]) / one.num_tokens
            for ref in context.members
            for one in [context.statistics[ref.variant_idx]]
        ],
        dtype=torch.float64,
    )
    total = used_M.sum()
    return used_M / total if total > 0 else torch.full_like(used_M, 1 / len(used_M))

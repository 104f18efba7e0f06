"""RegMean: the one matrix whose outputs are closest to each member's on that member's own inputs.

Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models" (2023),
https://arxiv.org/abs/2212.09849. With G_v the second moment of member v's inputs and A the average:

    W = (sum_v W_v G_v + r A) (sum_v G_v + r I)^-1,   r = 1e-3 * mean diagonal of sum_v G_v

Deviations: each token in G_v is weighted by its squared loss gradient, as calibration has it, so
that inputs count by what their outputs are worth; and a small pull towards the average takes the
place of the paper's scaling of G_v's off-diagonals.

Legend: R rows (outputs), C columns (inputs) of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeconsolidate.merging.average import Average
from moeconsolidate.merging.base import MergeRule, SlotContext
from moeconsolidate.parts import part_of
from moeruntime.pack.manifest import EXPERT_PARTS

__all__ = ["RegMean"]


@dataclass(frozen=True, slots=True)
class RegMean(MergeRule):
    """Linear regression, matrix by matrix; `ridge` is r over the mean diagonal."""

    ridge: float = 1e-3

    @property
    def whole_experts(self) -> bool:
        return True

    @property
    def needs_statistics(self) -> bool:
        return True

    def __call__(self, members: Sequence[Tensor], context: SlotContext, *, out: Tensor) -> Tensor:
        if len(members) == 1:
            return members[0]
        Average()(members, context, out=out)
        for part in EXPERT_PARTS:
            self._merge(
                [part_of(row_P, part, context.config) for row_P in members],
                _moments(context, part),
                part_of(out, part, context.config),
            )
        return out

    def _merge(self, members: Sequence[Tensor], moments: Sequence[Tensor], out_RC: Tensor) -> None:
        """Move `out_RC`, the average A, by (sum_v (W_v - A) G_v) (sum_v G_v + r I)^-1."""
        total_CC = torch.stack(list(moments)).sum(dim=0)
        ridge = self.ridge * total_CC.diagonal().mean()
        if not ridge > 0:  # No token came here.
            return
        total_CC.diagonal().add_(ridge)
        average_RC = out_RC.double()
        pull_RC = torch.zeros_like(average_RC)
        for member_RC, moment_CC in zip(members, moments, strict=True):
            pull_RC += (member_RC.double() - average_RC) @ moment_CC
        move_CR = torch.cholesky_solve(pull_RC.T, torch.linalg.cholesky(total_CC))
        out_RC.copy_(average_RC + move_CR.T)


def _moments(context: SlotContext, part: str) -> list[Tensor]:
    """G of each member for one part, float64, a token of its variant's text."""
    assert context.statistics is not None
    moments = []
    for ref in context.members:
        one = context.statistics[ref.variant_idx]
        moments.append(
            one.layers[context.layer][part].whole_moment(ref.expert).double() / one.num_tokens
        )
    return moments

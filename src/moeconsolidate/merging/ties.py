"""TIES: trim what fine-tunes changed least, elect a sign for each weight, merge those that agree.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (2023),
https://arxiv.org/abs/2306.01708. The base is a slot's first member, which is the first variant's
expert wherever that variant has one in the slot: name the base model first. A task vector is
trimmed expert by expert; the paper trims that of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeconsolidate.merging.base import MergeRule, SlotContext, combine_columns, wide_dtype

__all__ = ["Ties"]


@dataclass(frozen=True, slots=True)
class Ties(MergeRule):
    """base + scale * mean of the changes that agree with the elected sign.

    Attributes:
        density: part of each task vector that is kept, in (0, 1]; 1 trims nothing.
        scale: the paper's lambda.
    """

    density: float = 1.0
    scale: float = 1.0

    @property
    def whole_experts(self) -> bool:
        return self.density < 1.0

    def __call__(self, members: Sequence[Tensor], context: SlotContext, *, out: Tensor) -> Tensor:
        if len(members) == 1:
            return members[0]
        least_N1 = self._least_kept(members)

        def combine(rows_MC: Tensor) -> Tensor:
            base_C, changes_NC = rows_MC[0], rows_MC[1:]
            changes_NC -= base_C
            changes_NC *= changes_NC.abs() >= least_N1
            agree_NC = changes_NC.sign() == changes_NC.sum(dim=0).sign()
            # Where nothing changed, all agree on no change.
            mean_C = (changes_NC * agree_NC).sum(dim=0) / agree_NC.sum(dim=0).clamp_min(1)
            return base_C.add_(mean_C, alpha=self.scale)

        return combine_columns(members, out, combine)

    def _least_kept(self, members: Sequence[Tensor]) -> Tensor:
        """The smallest change of each member but the first that is kept."""
        wide = wide_dtype(members[0].dtype)
        if not self.whole_experts:
            return torch.zeros(len(members) - 1, 1, dtype=wide)
        num_trimmed = members[0].numel() - max(1, round(self.density * members[0].numel()))
        base_P = members[0].to(wide)
        return torch.stack(
            [
                (member.to(wide) - base_P).abs().kthvalue(num_trimmed + 1, keepdim=True).values
                for member in members[1:]
            ]
        )

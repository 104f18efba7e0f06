"""Task arithmetic: the base model plus the scaled sum of what each fine-tune changed.

Ilharco et al., "Editing Models with Task Arithmetic" (2023), https://arxiv.org/abs/2212.04089. The
base is a slot's first member, which is the first variant's expert wherever that variant has one in
the slot: name the base model first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moeconsolidate.merging.base import MergeRule, SlotContext, combine_columns

__all__ = ["TaskArithmetic"]


@dataclass(frozen=True, slots=True)
class TaskArithmetic(MergeRule):
    """base + scale * sum of (member - base)."""

    scale: float = 0.5

    def __call__(self, members: Sequence[Tensor], context: SlotContext, *, out: Tensor) -> Tensor:
        return members[0] if len(members) == 1 else combine_columns(members, out, self._combine)

    def _combine(self, rows_MC: Tensor) -> Tensor:
        base_C, changes_NC = rows_MC[0], rows_MC[1:]
        changes_NC -= base_C
        return base_C.add_(changes_NC.sum(dim=0), alpha=self.scale)

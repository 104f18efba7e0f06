"""The base model's expert for all: what sharing costs where nothing is merged at all.

A slot takes its first member, which is the first variant's expert wherever that variant has one in
the slot: name the base model first.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moeconsolidate.merging.base import MergeRule, SlotContext

__all__ = ["First"]


class First(MergeRule):
    """The first member, as it is."""

    def __call__(self, members: Sequence[Tensor], context: SlotContext, *, out: Tensor) -> Tensor:
        return members[0]

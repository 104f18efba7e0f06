"""What a merge rule is. Legend: P (weights, a whole expert or a run of its columns), M (members).

A rule says how a slot's weights follow from its members'. Most work weight by weight and are handed
runs of columns; a rule that looks at matrices, or at a whole expert, says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeconsolidate.importance import Statistics
from moeconsolidate.plan import ExpertRef
from moeruntime.families import ModelConfig

__all__ = ["MergeRule", "SlotContext", "combine_columns", "wide_dtype"]

CHUNK_ELEMENTS = 2**15
"""Weights combined at once: they stay in the cache, and torch runs operations of this size on the
calling thread. Spread over threads, each of these many short operations would wait for the slowest,
which on a busy machine took fifty times as long and on an idle one saved a tenth."""


@dataclass(frozen=True, slots=True)
class SlotContext:
    """What a rule may know of the slot it merges, besides its members' weights.

    Attributes:
        layer: of the model.
        slot: of the layer.
        members: whose weights they are, in the order of the rows.
        config: the architecture, which gives a row its matrices.
        statistics: each variant's calibration, in order; None unless the rule needs it.
    """

    layer: int
    slot: int
    members: tuple[ExpertRef, ...]
    config: ModelConfig
    statistics: Sequence[Statistics] | None = None


class MergeRule(ABC):
    """Merges the members of one slot."""

    @property
    def whole_experts(self) -> bool:
        """Whether rows must be whole experts, and not runs of their columns."""
        return False

    @property
    def needs_statistics(self) -> bool:
        """Whether the variants must be calibrated."""
        return False

    @abstractmethod
    def __call__(self, members: Sequence[Tensor], context: SlotContext, *, out: Tensor) -> Tensor:
        """Merge rows of equal dtype and shape [P].

        A rule is exact for one member and for identical ones. Where rows may be runs of columns, a
        run merges to the same run of the whole result, whatever the number of threads.

        Args:
            members: at least one row, in the order of the variants.
            context: the slot.
            out: memory of the same dtype and shape that the result may be written to.

        Returns:
            The merged row: `out`, or one of the members.
        """


def combine_columns(
    members: Sequence[Tensor], out: Tensor, combine: Callable[[Tensor], Tensor]
) -> Tensor:
    """Fill `out` with what `combine` makes of the members' weights, some columns at a time.

    Peak scratch: a few times 256 KiB a member.

    Args:
        members: rows of one 16-bit or 32-bit float type.
        out: the result.
        combine: [M, columns] of `wide_dtype`, which it may overwrite -> [columns].
    """
    first = members[0]
    wide_MC = torch.empty(
        len(members), min(CHUNK_ELEMENTS, first.numel()), dtype=wide_dtype(first.dtype)
    )
    for start in range(0, first.numel(), CHUNK_ELEMENTS):
        columns = slice(start, min(start + CHUNK_ELEMENTS, first.numel()))
        rows_MC = wide_MC[:, : columns.stop - start]
        for row_C, member in zip(rows_MC, members, strict=True):
            row_C.copy_(member[columns])
        out[columns] = combine(rows_MC)
    return out


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in: float32 for 16-bit weights, float64 for float32."""
    return torch.float64 if dtype == torch.float32 else torch.float32

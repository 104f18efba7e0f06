"""What a merge rule is. Legend: P (weights, a whole expert or a run of its columns)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["MergeRule"]


class MergeRule(Protocol):
    """Merges the members of one slot."""

    def __call__(self, members: Sequence[Tensor], *, out: Tensor) -> Tensor:
        """Merge rows of equal dtype and shape [P].

        A rule works weight by weight, so that a run of columns merges to the same run of the whole
        result; it is exact for one member and for identical ones; its result does not depend on
        the number of threads.

        Args:
            members: at least one row, in the order of the variants.
            out: memory of the same dtype and shape that the result may be written to.

        Returns:
            The merged row: `out`, or the only member itself.
        """
        ...

"""Plain averaging of weights.

The uniform soup of Wortsman et al., "Model soups" (2022), https://arxiv.org/abs/2203.05482, applied
to the experts of a slot instead of to whole models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["average"]

CHUNK_ELEMENTS = 2**15
"""Weights summed at once: the sums stay in the cache, and torch runs operations of this size on the
calling thread. Spread over threads, each of these many short operations would wait for the slowest,
which on a busy machine took fifty times as long and on an idle one saved a tenth."""


def average(members: Sequence[Tensor], *, out: Tensor) -> Tensor:
    """Average the members, in their order. Takes and returns what `MergeRule` says.

    Sums are taken in float32 for 16-bit weights and in float64 for float32, which holds any sum of
    equal weights exactly: identical members come out bit by bit. Peak scratch: 512 KiB.
    """
    first, *rest = members
    if not rest:
        return first
    wide = torch.float64 if first.dtype == torch.float32 else torch.float32
    sum_C = torch.empty(min(CHUNK_ELEMENTS, first.numel()), dtype=wide)
    term_C = torch.empty_like(sum_C)
    for start in range(0, first.numel(), CHUNK_ELEMENTS):
        columns = slice(start, min(start + CHUNK_ELEMENTS, first.numel()))
        width = columns.stop - start
        # Starting from the first member rather than from zero keeps the sign of -0.0.
        total = sum_C[:width].copy_(first[columns])
        for member in rest:
            total += term_C[:width].copy_(member[columns])
        out[columns] = total.div_(len(members))
    return out

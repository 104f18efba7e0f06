"""Where each sequence of a step has its tokens, as attention kernels read it. Imports no Triton.

Legend: S sequences, B blocks of a sequence, N pieces of work, P programs, R rows of a program,
D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "SPAN_TOKENS",
    "SpanCut",
    "SpanScratch",
    "Spans",
    "padded",
    "tables_of_lone",
    "to_device",
]

SPAN_TOKENS = 32
"""New tokens of one sequence that a program of `span_attention` takes."""

SPAN_HEADS = 4
"""Query heads of a key-value head that it takes at most."""

SPLIT_PROGRAMS = 256
"""It cuts contexts where its programs stay so few."""

SPLIT_KEYS = 512
"""And where that leaves each of them more than about so many keys."""


@dataclass(frozen=True, slots=True)
class Spans:
    """The sequences of a step, on the device.

    Attributes:
        rows_3S: int32; of each sequence the first row among the step's tokens, the row past its
            last, and its tokens in the cache, the new ones included.
        tables_SB: int32 block tables, a row a sequence.
    """

    rows_3S: Tensor
    tables_SB: Tensor

    @classmethod
    def build(
        cls,
        spans: Sequence[tuple[int, int, int]],
        block_tables: Sequence[Sequence[int]],
        device: torch.device,
    ) -> Spans:
        """Lay out (start, stop, context) and the blocks of each sequence; one transfer."""
        columns = [number for column in zip(*spans, strict=True) for number in column]
        blocks = [block for table in padded(block_tables) for block in table]
        packed = torch.tensor([*columns, *blocks], dtype=torch.int32)
        parts = to_device(packed, device).split([len(columns), len(blocks)])
        return cls(parts[0].view(3, -1), parts[1].view(len(spans), -1))


@dataclass(frozen=True, slots=True)
class SpanCut:
    """How attention over a step with prompts is cut into programs.

    A piece of work is up to SPAN_TOKENS new tokens of a sequence, and all that they see or, where
    few programs would have to walk along far, a split of that.

    Attributes:
        num_kv_heads: that each piece has programs for.
        heads: query heads of a program, which share keys.
        runs: programs for the query heads of a key-value head.
        window: tokens that a token sees; None is all.
    """

    num_kv_heads: int
    heads: int
    runs: int
    window: int | None

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, window: int | None) -> SpanCut:
        """For a model's heads."""
        a_kv = num_heads // num_kv_heads
        heads = min(SPAN_HEADS, 1 << (a_kv - 1).bit_length())
        return cls(num_kv_heads, heads, -(-a_kv // heads), window)

    @property
    def programs(self) -> int:
        """Of a piece."""
        return self.num_kv_heads * self.runs

    def pieces(self, spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int, int]]:
        """(sequence, first row within it, split, splits) of those that bring several tokens.

        Splits of the same tokens follow each other.
        """
        tiles = [
            (idx, first, context - (stop - start) + min(first + SPAN_TOKENS, stop - start))
            for idx, (start, stop, context) in enumerate(spans)
            for first in range(0, stop - start, SPAN_TOKENS)
            if stop - start > 1
        ]
        most_splits = SPLIT_PROGRAMS // (self.programs * max(1, len(tiles)))
        found = []
        most_keys = math.inf if self.window is None else self.window + SPAN_TOKENS
        for idx, first, num_keys in tiles:
            splits = max(1, min(most_splits, int(min(num_keys, most_keys)) // SPLIT_KEYS))
            found += [(idx, first, split, splits) for split in range(splits)]
        return found

    def most_pieces(self, num_tokens: int) -> int:
        """That so many tokens of a step can form."""
        return max(num_tokens // 2, SPLIT_PROGRAMS // self.programs)


class SpanScratch:
    """Where splits leave their sums; reused by every layer of a step.

    Attributes:
        sums: float32 [P, R, D].
        totals: float32 [2, P, R], the largest score and the sum of weights.
        arrived: int32 [P]; at the first of a piece's splits, how many are done.
    """

    def __init__(self, cut: SpanCut, head_dim: int, device: torch.device) -> None:
        """Allocate for all pieces of a step that is cut along its contexts."""
        shape = (SPLIT_PROGRAMS, SPAN_TOKENS * cut.heads)
        self.sums = torch.empty(*shape, head_dim, dtype=torch.float32, device=device)
        self.totals = torch.empty(2, *shape, dtype=torch.float32, device=device)
        # Each combining split puts its counter back to 0.
        self.arrived = torch.zeros(SPLIT_PROGRAMS, dtype=torch.int32, device=device)

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        yield from (self.sums, self.totals, self.arrived)


def tables_of_lone(spans: Sequence[tuple[int, int, int]]) -> list[int]:
    """For each token the sequence whose only new one it is, -1 where it is not alone."""
    return [
        idx if stop - start == 1 else -1
        for idx, (start, stop, _) in enumerate(spans)
        for _ in range(start, stop)
    ]


def padded(block_tables: Sequence[Sequence[int]]) -> list[list[int]]:
    """Block tables as long as the longest."""
    width = max(len(table) for table in block_tables)
    return [[*table, *[0] * (width - len(table))] for table in block_tables]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A step's input where it is needed."""
    if device.type != "cuda":
        return values.to(device)
    from moeruntime.kernels.upload import uploader  # imports Triton

    return uploader(device).send(values)

"""Where each sequence of a step has its tokens, as attention kernels read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SPAN_TOKENS", "Spans", "padded", "span_tiles", "tables_of_lone", "to_device"]

SPAN_TOKENS = 32
"""New tokens of one sequence that a program of `span_attention` takes."""


@dataclass(frozen=True, slots=True)
class Spans:
    """The sequences of a step, on the device.

    Attributes:
        tiles_N2: int32 (sequence, first row within it), one for every SPAN_TOKENS new tokens of
            those that have more than one; a sequence of -1 is none.
        rows_3S: int32; of each sequence the first row among the step's tokens, the row past its
            last, and its tokens in the cache, the new ones included.
        tables_SB: int32 block tables, a row a sequence.
    """

    tiles_N2: Tensor
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
        tiles = [number for tile in span_tiles(spans) for number in tile]
        columns = [number for column in zip(*spans, strict=True) for number in column]
        blocks = [block for table in padded(block_tables) for block in table]
        packed = torch.tensor([*tiles, *columns, *blocks], dtype=torch.int32)
        parts = to_device(packed, device).split([len(tiles), len(columns), len(blocks)])
        return cls(parts[0].view(-1, 2), parts[1].view(3, -1), parts[2].view(len(spans), -1))


def span_tiles(spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """(sequence, first row within it) of each tile of those that have more than one new token."""
    return [
        (idx, first)
        for idx, (start, stop, _) in enumerate(spans)
        for first in range(0, stop - start, SPAN_TOKENS)
        if stop - start > 1
    ]


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

"""Where each sequence of a step has its tokens, as attention kernels read it. Imports no Triton.

Legend: S sequences, B blocks of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Spans", "padded", "tables_of_lone", "to_device"]


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

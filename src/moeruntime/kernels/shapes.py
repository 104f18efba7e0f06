"""How products of few tokens are cut into programs. Imports no Triton: plans are made with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Shape", "tile_rows"]


@dataclass(frozen=True, slots=True)
class Shape:
    """How a product is cut: rows of weights a program, inputs a step, tokens a tile, parts."""

    rows: int
    step: int
    tokens: int
    parts: int = 1
    warps: int = 4
    stages: int = 4


def tile_rows(
    groups: Sequence[tuple[int, int, int]], tokens: int, num_tiles: int
) -> list[list[int]]:
    """Cut runs (slot, start, stop) of tokens into tiles.

    Returns:
        Three lists of `num_tiles`: slots (-1 where unused), starts and stops.
    """
    tiles = [
        (slot, at, min(at + tokens, stop))
        for slot, start, stop in groups
        for at in range(start, stop, tokens)
    ]
    assert len(tiles) <= num_tiles
    tiles += [(-1, 0, 0)] * (num_tiles - len(tiles))
    return [list(column) for column in zip(*tiles, strict=True)]

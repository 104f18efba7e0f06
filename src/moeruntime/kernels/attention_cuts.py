"""How attention over a paged cache is cut into programs, and where they leave what is in parts.

Imports no Triton: plans are made with it, and memory is counted.

Legend: N pieces of work, S splits, Q query heads, P programs, R rows of a program, D head
dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SPAN_TOKENS", "DecodeCut", "DecodeScratch", "SpanCut", "SpanScratch"]

SPAN_TOKENS = 32
"""New tokens of one sequence that a program of `span_attention` takes."""

SPAN_HEADS = 4
"""Query heads of a key-value head that it takes at most."""

SPLIT_PROGRAMS = 256
"""Contexts are cut where programs stay so few."""

SPLIT_KEYS = 256
"""And, behind prompts, where that leaves each of them more than about so many keys."""

MOST_SPLITS = 16
"""Of a decode's context, whose last program puts all of them together."""


@dataclass(frozen=True, slots=True)
class DecodeCut:
    """How `decode_attention` is cut; a program has a key-value head of a sequence, or a split.

    Attributes:
        splits: of each context.
        keys: that a program takes at a time.
        warps: of a program.
        stages: how many times `keys` it holds.
        early: whether it fetches the first of them before queries are there, which are held in
            registers until then.
    """

    splits: int
    keys: int = 128
    warps: int = 4
    stages: int = 2
    early: bool = True

    @classmethod
    def of(cls, num_sequences: int, num_kv_heads: int) -> DecodeCut:
        """Measured on an H200 with heads of 128, contexts of 512 and of thousands.

        Few programs have to fetch much at a time each. Many take turns, and hide how long each
        waits where small ones are side by side on a multiprocessor.
        """
        num_programs = num_sequences * num_kv_heads
        splits = max(1, min(MOST_SPLITS, SPLIT_PROGRAMS // num_programs))
        if num_programs <= SPLIT_PROGRAMS:
            return cls(splits)
        if num_programs <= 2 * SPLIT_PROGRAMS:
            return cls(splits, keys=64, warps=2)
        return cls(splits, keys=32, warps=1, stages=3, early=False)


class DecodeScratch:
    """Where splits leave their sums; reused by every layer of a step.

    Attributes:
        cut: how the work is cut.
        sums: float32 [sequences, S, Q, D].
        totals: float32 [2, sequences, S, Q], the largest score and the sum of weights.
        arrived: int32 [sequences, key-value heads]; how many splits are done.
    """

    def __init__(
        self,
        cut: DecodeCut,
        max_sequences: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
    ) -> None:
        """Allocate for the splits of every (sequence, key-value head)."""
        self.cut = cut
        heads = (max_sequences, cut.splits, num_heads)
        self.sums = torch.zeros(*heads, head_dim, dtype=torch.float32, device=device)
        self.totals = torch.zeros(2, *heads, dtype=torch.float32, device=device)
        # Each combining split puts its counter back to 0.
        self.arrived = torch.zeros(max_sequences, num_kv_heads, dtype=torch.int32, device=device)


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
        cut: how the work is cut.
        sums: float32 [P, R, D].
        totals: float32 [2, P, R], the largest score and the sum of weights.
        arrived: int32 [P]; at the first of a piece's splits, how many are done.
    """

    def __init__(self, cut: SpanCut, head_dim: int, device: torch.device) -> None:
        """Allocate for all pieces of a step that is cut along its contexts."""
        self.cut = cut
        shape = (SPLIT_PROGRAMS, SPAN_TOKENS * cut.heads)
        self.sums = torch.empty(*shape, head_dim, dtype=torch.float32, device=device)
        self.totals = torch.empty(2, *shape, dtype=torch.float32, device=device)
        # Each combining split puts its counter back to 0.
        self.arrived = torch.zeros(SPLIT_PROGRAMS, dtype=torch.int32, device=device)

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        yield from (self.sums, self.totals, self.arrived)

"""One step's input as tensors: tokens of many sequences and variants, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from moeruntime.kernels import TokenGroup
from moeruntime.kernels.spans import Spans, to_device
from moeruntime.kv_cache import BLOCK_TOKENS, blocks_for

__all__ = ["Batch", "Span", "lay_out", "token_groups"]


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens one sequence brings to a step.

    Attributes:
        slot: resident slot of its variant's non-expert weights.
        variant_idx: its variant's row of the expert map.
        token_ids: the new tokens.
        start: position of the first of them in the sequence.
        block_table: its cache blocks, enough for every position up to the last new one.
        num_source: of an encoder-decoder's sequence, tokens that its encoder reads.
        source_table: the cache blocks of what the encoder made of them.
        source_ids: these tokens, if the encoder is to run in this step.
    """

    slot: int
    variant_idx: int
    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    num_source: int = 0
    source_table: Sequence[int] = ()
    source_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """A step ready for the model; T tokens, grouped by resident slot.

    Attributes:
        token_ids_T, positions_T: int64.
        slot_T, variant_T: int64; resident slot and expert-map row of each token.
        cache_rows_T: int64; where each token's key and value go, block * BLOCK_TOKENS + row.
        groups: the rows of each resident slot.
        spans: (start, stop, context) a sequence, in the order of the batch.
        spans_on_device: the same with the cache blocks of each sequence.
        sources: the encoder's step before this one, over those sources that have not been read.
        source_spans: (start, stop, source tokens) a sequence, where there is an encoder.
        sources_on_device: the same with the cache blocks of each source.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slot_T: Tensor
    variant_T: Tensor
    cache_rows_T: Tensor
    groups: tuple[TokenGroup, ...]
    spans: tuple[tuple[int, int, int], ...]
    spans_on_device: Spans
    sources: Batch | None = None
    source_spans: tuple[tuple[int, int, int], ...] = ()
    sources_on_device: Spans | None = None

    @classmethod
    def build(cls, sequences: Sequence[Span], device: torch.device) -> Batch:
        """Lay sequences side by side; they must already be sorted by slot."""
        columns, spans = lay_out(sequences)
        # One transfer for all the per-token integers.
        packed = to_device(torch.tensor(columns), device)
        token_ids_T, positions_T, slot_T, variant_T, cache_rows_T = packed.unbind()
        source_spans: tuple[tuple[int, int, int], ...] = ()
        sources_on_device = None
        if any(one.num_source for one in sequences):
            source_spans = tuple(
                (start, stop, one.num_source)
                for one, (start, stop, _) in zip(sequences, spans, strict=True)
            )
            tables = [one.source_table for one in sequences]
            sources_on_device = Spans.build(source_spans, tables, device)
        return cls(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            slot_T=slot_T,
            variant_T=variant_T,
            cache_rows_T=cache_rows_T,
            groups=token_groups(columns[2]),
            spans=tuple(spans),
            spans_on_device=Spans.build(spans, [s.block_table for s in sequences], device),
            sources=cls._to_encode(sequences, device),
            source_spans=source_spans,
            sources_on_device=sources_on_device,
        )

    @classmethod
    def _to_encode(cls, sequences: Sequence[Span], device: torch.device) -> Batch | None:
        unread = [
            Span(one.slot, one.variant_idx, one.source_ids, 0, one.source_table)
            for one in sequences
            if one.source_ids
        ]
        return cls.build(unread, device) if unread else None

    @property
    def block_tables(self) -> list[Tensor]:
        """int32 cache blocks of each sequence."""
        tables_SB = self.spans_on_device.tables_SB
        return [
            table_B[: blocks_for(context)]
            for table_B, (_, _, context) in zip(tables_SB, self.spans, strict=True)
        ]


def lay_out(sequences: Sequence[Span]) -> tuple[list[list[int]], list[tuple[int, int, int]]]:
    """Put the tokens of sequences side by side.

    Returns:
        Tokens, positions, resident slots, variants and cache rows, as `Batch` has them; and
        (start, stop, context) of each sequence.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    variants: list[int] = []
    rows: list[int] = []
    spans: list[tuple[int, int, int]] = []
    for sequence in sequences:
        count = len(sequence.token_ids)
        where = range(sequence.start, sequence.start + count)
        spans.append((len(tokens), len(tokens) + count, sequence.start + count))
        tokens += sequence.token_ids
        positions += where
        slots += [sequence.slot] * count
        variants += [sequence.variant_idx] * count
        rows += [
            sequence.block_table[pos // BLOCK_TOKENS] * BLOCK_TOKENS + pos % BLOCK_TOKENS
            for pos in where
        ]
    return [tokens, positions, slots, variants, rows], spans


def token_groups(slots: Iterable[int]) -> tuple[TokenGroup, ...]:
    """Runs of equal slots; each slot must form one run."""
    groups = []
    start = 0
    for slot, run in groupby(slots):
        stop = start + sum(1 for _ in run)
        groups.append(TokenGroup(slot, start, stop))
        start = stop
    assert len({group.slot for group in groups}) == len(groups), "tokens not sorted by slot"
    return tuple(groups)

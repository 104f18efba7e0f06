"""Attention of a step's sequences over the cache, whatever each of them brings.

A sequence's only new token has a kernel of its own, which is cut along the context; those that
bring more share one. Where no sequence does, as in most steps, a single launch is all.

Legend: T tokens, N of them that are alone, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeruntime.families import DecoderConfig
from moeruntime.kernels import attention
from moeruntime.kernels.attention_cuts import DecodeCut, DecodeScratch, SpanScratch
from moeruntime.kernels.spans import Spans
from moeruntime.kv_cache import KVCache

__all__ = ["SOME_DECODES", "LoneTokens", "PromptTokens", "StepAttention", "decode_scratch"]

SOME_DECODES = 8
"""Beside prompts: contexts are cut as if there were so many."""


@dataclass(frozen=True, slots=True)
class LoneTokens:
    """Those that are their sequence's only one in a step.

    Attributes:
        rows_N: int64; which rows of the step they are. None in a graph, where that differs from
            step to step: then N is T, and `table_N` says which to leave alone.
        position_N, table_N: int64; positions, and which of the block tables is theirs.
        scratch: for their splits.
    """

    rows_N: Tensor | None
    position_N: Tensor
    table_N: Tensor
    scratch: DecodeScratch


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Those that have others of their sequence beside them in a step.

    Attributes:
        pieces_N4: int32, as `SpanCut.pieces` has them; a sequence of -1 is none.
        scratch: for their splits.
    """

    pieces_N4: Tensor
    scratch: SpanScratch


@dataclass(frozen=True, slots=True)
class StepAttention:
    """Where a step's tokens are; serves all layers.

    Attributes:
        config: the architecture.
        cache: keys and values.
        rotary: float32 cosines and sines [positions, D / 2].
        position_T, cache_row_T: int64, as `Batch` has them.
        spans: the sequences.
        lone: those that bring one token; None where it is known that none does.
        prompts: those that bring more; None where it is known that none does.
    """

    config: DecoderConfig
    cache: KVCache
    rotary: tuple[Tensor, Tensor]
    position_T: Tensor
    cache_row_T: Tensor
    spans: Spans
    lone: LoneTokens | None
    prompts: PromptTokens | None

    def __call__(self, layer: int, qkv_TC: Tensor, *, out_TC: Tensor) -> None:
        """Store a layer's keys and values, and attend.

        Args:
            layer: which.
            qkv_TC: queries, keys and values side by side.
            out_TC: what each query finds.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        window = self.config.sliding_window
        query_TQD = out_TC.view(-1, self.config.num_heads, self.config.head_dim)
        if self.prompts is not None:
            attention.rotate_and_store(
                qkv_TC,
                self.position_T,
                self.cache_row_T,
                self.rotary,
                keys,
                values,
                out_TQD=query_TQD,
            )
        if self.lone is not None:
            lone, rows_N = self.lone, self.lone.rows_N
            found_NC = out_TC if rows_N is None else out_TC.new_empty(len(rows_N), out_TC.shape[1])
            attention.decode_attention(
                qkv_TC if rows_N is None else qkv_TC[rows_N],
                lone.position_N,
                lone.table_N,
                self.spans.tables_SB,
                self.rotary,
                keys,
                values,
                lone.scratch,
                window,
                out_TC=found_NC,
            )
            if rows_N is not None:
                out_TC.index_copy_(0, rows_N, found_NC)
        if self.prompts is not None:
            attention.span_attention(
                query_TQD,
                keys,
                values,
                self.spans,
                self.prompts.pieces_N4,
                self.prompts.scratch,
                out_TQD=query_TQD,
            )


def decode_scratch(
    config: DecoderConfig, num_sequences: int, *, fewest: int, device: torch.device
) -> DecodeScratch:
    """For up to `num_sequences`, cut as is best for `fewest`."""
    kv = config.num_kv_heads
    cut = DecodeCut.of(fewest, kv)
    return DecodeScratch(cut, num_sequences, config.num_heads, kv, config.head_dim, device)

"""Attention of many sequences at once, padded to the longest: plain PyTorch for any device.

What it needs to know of a step is worked out once and serves all blocks of a stack. Nothing here
waits for the device.

Legend: T tokens of the step, S sequences, Q queries and K keys of the longest, X rows that keys may
lie in, N heads, D head dimension, R resident slots, B buckets of distances.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moeruntime.kernels.spans import Spans
from moeruntime.kv_cache import BLOCK_TOKENS
from moeruntime.models.layers import relative_buckets

__all__ = ["PaddedAttention", "RelativePositions"]

MAX_SCORES = 2**23
"""Scores of sequences that run together, unless a single one has more."""


@dataclass(frozen=True, slots=True)
class RelativePositions:
    """Biases of a stack: bias_RBN, and how its buckets are meant (see `relative_buckets`)."""

    bias_RBN: Tensor
    causal: bool
    max_distance: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences that run together; mask [S, N or 1, Q, K], added to scores or, boolean, seen."""

    query_rows_SQ: Tensor
    key_rows_SK: Tensor
    mask: Tensor
    sequence_T: Tensor
    query_T: Tensor


class PaddedAttention:
    """Where the queries and keys of a step's sequences are, and who may see whom."""

    def __init__(
        self,
        spans: Sequence[tuple[int, int, int]],
        on_device: Spans,
        *,
        num_heads: int,
        cached: bool = True,
        positions: RelativePositions | None = None,
        slot_T: Tensor | None = None,
    ) -> None:
        """Work everything out.

        Args:
            spans: (start, stop, context) a sequence: its rows of the queries, and how many keys it
                has, the last of which are the queries' own where positions matter.
            on_device: the same with their cache blocks.
            num_heads: N.
            cached: keys lie in cache blocks; else in the rows of the queries.
            positions: what is added to scores; without, every query sees all keys alike.
            slot_T: resident slot of each token, for `positions`.
        """
        self._groups = []
        for first, last in _runs(spans, num_heads):
            rows_3S = on_device.rows_3S[:, first:last].long()
            tables_SB = on_device.tables_SB[first:last].long()
            some = spans[first:last]
            self._groups.append(_group(some, rows_3S, tables_SB, cached, positions, slot_T))

    def __call__(self, query_TND: Tensor, key_XND: Tensor, value_XND: Tensor) -> Tensor:
        """Attend without scaling scores.

        Args:
            query_TND: queries of all sequences.
            key_XND: keys, in rows of the cache or of the step.
            value_XND: the same for values.

        Returns:
            [T, N * D].
        """
        outs = []
        for group in self._groups:
            attended_SNQD = F.scaled_dot_product_attention(
                query_TND[group.query_rows_SQ].transpose(1, 2),
                key_XND[group.key_rows_SK].transpose(1, 2),
                value_XND[group.key_rows_SK].transpose(1, 2),
                attn_mask=group.mask,
                scale=1.0,
            )
            outs.append(attended_SNQD[group.sequence_T, :, group.query_T])
        return torch.cat(outs).flatten(1)


def _runs(spans: Sequence[tuple[int, int, int]], num_heads: int) -> Iterator[tuple[int, int]]:
    """Neighbours that stay within MAX_SCORES together."""
    first, queries, keys = 0, 0, 0
    for idx, (start, stop, context) in enumerate(spans):
        longest = max(queries, stop - start), max(keys, context)
        if idx > first and (idx + 1 - first) * num_heads * longest[0] * longest[1] > MAX_SCORES:
            yield first, idx
            first, longest = idx, (stop - start, context)
        queries, keys = longest
    yield first, len(spans)


def _group(
    spans: Sequence[tuple[int, int, int]],
    rows_3S: Tensor,
    tables_SB: Tensor,
    cached: bool,
    positions: RelativePositions | None,
    slot_T: Tensor | None,
) -> _Group:
    start_S1, stop_S1, context_S1 = rows_3S[:, :, None]
    count_S1 = stop_S1 - start_S1
    num_queries = max(stop - start for start, stop, _ in spans)
    num_keys = max(context for _, _, context in spans)
    device = rows_3S.device
    # What is past a sequence's end repeats its last: rows that nobody wrote may hold NaN, which
    # no mask hides.
    query_SQ = torch.minimum(torch.arange(num_queries, device=device)[None], count_S1 - 1)
    key_K = torch.arange(num_keys, device=device)
    key_SK = torch.minimum(key_K, context_S1 - 1)
    if cached:
        blocks_SK = tables_SB.gather(1, key_SK // BLOCK_TOKENS)
        key_rows_SK = blocks_SK * BLOCK_TOKENS + key_SK % BLOCK_TOKENS
    else:
        key_rows_SK = start_S1 + key_SK
    hidden_SQK = (key_K >= context_S1)[:, None].expand(-1, num_queries, -1)
    if positions is None:
        mask = ~hidden_SQK[:, None]
    else:
        assert slot_T is not None
        ahead_SQK = key_K - (context_S1 - count_S1 + query_SQ)[..., None]
        bucket_SQK = relative_buckets(
            ahead_SQK,
            positions.bias_RBN.shape[1],
            causal=positions.causal,
            max_distance=positions.max_distance,
        )
        bias_SQKN = positions.bias_RBN[slot_T[start_S1[..., None]], bucket_SQK]
        if positions.causal:
            hidden_SQK = hidden_SQK | (ahead_SQK > 0)
        mask = bias_SQKN.permute(0, 3, 1, 2).masked_fill(hidden_SQK[:, None], -torch.inf)
    num_tokens = spans[-1][1] - spans[0][0]
    sequence_T = torch.repeat_interleave(
        torch.arange(len(spans), device=device), count_S1[:, 0], output_size=num_tokens
    )
    token_T = torch.arange(spans[0][0], spans[-1][1], device=device)
    return _Group(
        query_rows_SQ=start_S1 + query_SQ,
        key_rows_SK=key_rows_SK,
        mask=mask,
        sequence_T=sequence_T,
        query_T=token_T - start_S1[:, 0][sequence_T],
    )

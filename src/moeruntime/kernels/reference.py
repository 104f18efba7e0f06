"""Plain PyTorch kernels: slow where they loop, right everywhere.

Legend: T tokens of the step, sorted so that tokens of one variant are adjacent; R resident slots;
K experts per token; H hidden, I intermediate; Q query heads, KV key-value heads, D head dimension;
B tokens of a cache block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from moeruntime.families import Activation
    from moeruntime.models.experts import ExpertPool

__all__ = [
    "TokenGroup",
    "activate",
    "expert_mlp",
    "grouped_linear",
    "paged_attention",
    "write_cache",
]


class TokenGroup(NamedTuple):
    """Rows [start, stop) of a step belong to the variant in resident slot `slot`."""

    slot: int
    start: int
    stop: int


def grouped_linear(x_TI: Tensor, weight_ROI: Tensor, groups: Sequence[TokenGroup]) -> Tensor:
    """Multiply each token by the weights of its own variant.

    Args:
        x_TI: inputs, grouped by variant.
        weight_ROI: one [O, I] matrix a resident slot; slot stride 0 where all variants share one.
        groups: which rows belong to which slot; they tile x_TI.

    Returns:
        [T, O] in x's dtype.
    """
    if weight_ROI.stride(0) == 0 or len(groups) == 1:
        return F.linear(x_TI, weight_ROI[groups[0].slot])
    out = x_TI.new_empty(x_TI.shape[0], weight_ROI.shape[1])
    for slot, start, stop in groups:
        torch.mm(x_TI[start:stop], weight_ROI[slot].t(), out=out[start:stop])
    return out


def activate(inner_NI: Tensor, activation: Activation) -> Tensor:
    """What stands between an expert's two products.

    Args:
        inner_NI: the first product: "swiglu" takes gate and up side by side [N, 2I] and gives
            silu(gate) * up (Shazeer 2020), "relu" takes [N, I].
        activation: which.
    """
    if activation == "relu":
        return F.relu(inner_NI)
    gate, up = inner_NI.chunk(2, dim=-1)
    return F.silu(gate) * up


def expert_mlp(
    x_TH: Tensor,
    faces_TK: Tensor,
    weights_TK: Tensor,
    pool: ExpertPool,
    activation: Activation = "swiglu",
) -> Tensor:
    """Apply each token's K experts and add them up by routing weight.

    `faces_TK` names distinct experts, so tokens of different variants that share one meet in one
    product.

    Args:
        x_TH: expert inputs.
        faces_TK: int64 faces of the pool.
        weights_TK: float32 routing weights.
        pool: the layer's experts.
        activation: what they do between their products.

    Returns:
        [T, H] in x's dtype; weighted sums are formed in float32.
    """
    num_tokens, top_k = faces_TK.shape
    order = faces_TK.flatten().argsort(stable=True)
    counts = faces_TK.flatten().bincount(minlength=pool.num_faces).tolist()
    tokens = order // top_k
    sorted_out = x_TH.new_empty(num_tokens * top_k, x_TH.shape[1])
    start = 0
    for face, count in enumerate(counts):
        if not count:
            continue
        stop = start + count
        gate_up_IH, down_HI = pool.weights(face)
        inner = activate(F.linear(x_TH[tokens[start:stop]], gate_up_IH), activation)
        sorted_out[start:stop] = F.linear(inner, down_HI)
        start = stop
    out = torch.empty_like(sorted_out)
    out[order] = sorted_out
    weighted = out.view(num_tokens, top_k, -1).float() * weights_TK[..., None]
    return weighted.sum(dim=1).to(x_TH.dtype)


def write_cache(cache: Tensor, rows_T: Tensor, new_TKD: Tensor) -> None:
    """Store new keys or values. cache: [blocks, B, KV, D]; rows_T: block * B + row within it."""
    cache.view(-1, *cache.shape[2:])[rows_T] = new_TKD


def paged_attention(
    query_TQD: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: Sequence[tuple[int, int, int]],
    block_tables: Sequence[Tensor],
    sliding_window: int | None,
) -> Tensor:
    """Causal grouped-query attention of each sequence's new tokens over its cached ones.

    Args:
        query_TQD: queries of all sequences of the step, rotary applied.
        keys: cache [blocks, B, KV, D], which already holds the new tokens' keys.
        values: the same for values.
        spans: (start, stop, context) a sequence: its rows of query_TQD, and its tokens in cache
            including the new ones.
        block_tables: int64 block numbers, one tensor a sequence.
        sliding_window: a token sees itself and the `sliding_window` - 1 tokens before it.

    Returns:
        [T, Q * D] in the query's dtype.
    """
    out = torch.empty_like(query_TQD)
    for (start, stop, context), table in zip(spans, block_tables, strict=True):
        key = keys[table].flatten(0, 1)[:context].transpose(0, 1)
        value = values[table].flatten(0, 1)[:context].transpose(0, 1)
        query = query_TQD[start:stop].transpose(0, 1)
        num_new = stop - start
        whole_prompt = num_new == context and sliding_window is None
        mask = None
        if not whole_prompt and (num_new > 1 or sliding_window is not None):
            mask = _causal_mask(num_new, context, sliding_window, query.device)
        attended = F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=whole_prompt and num_new > 1,
            enable_gqa=query.shape[0] != key.shape[0],
        )
        out[start:stop] = attended[0].transpose(0, 1)
    return out.flatten(1)


def _causal_mask(
    num_new: int, context: int, sliding_window: int | None, device: torch.device
) -> Tensor:
    """Boolean [num_new, context], true where a new token may look."""
    query_pos = torch.arange(context - num_new, context, device=device)[:, None]
    key_pos = torch.arange(context, device=device)[None, :]
    mask = key_pos <= query_pos
    if sliding_window is not None:
        mask &= key_pos > query_pos - sliding_window
    return mask

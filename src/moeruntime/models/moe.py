"""Routing, and the map from a variant's logical experts to the layer's shared slots."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["over_capacity", "route", "route_first"]


def route(logits_TE: Tensor, slot_map_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose each token's experts as its own variant's router says, and find their slots.

    Mixtral's rule (Jiang et al. 2024): softmax over all experts in float32, the top k,
    renormalised. The map is applied to the choice, never to the scores, so routing is untouched
    by consolidation.

    Args:
        logits_TE: router outputs.
        slot_map_TE: int64; the slot behind each logical expert of the token's variant.
        top_k: experts per token.

    Returns:
        slots_TK (int64) and weights_TK (float32, each row adds up to 1).
    """
    weights_TK, experts_TK = logits_TE.float().softmax(dim=-1).topk(top_k, dim=-1)
    weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return slot_map_TE.gather(1, experts_TK), weights_TK


def route_first(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Choose each token's likeliest logical expert.

    Switch's rule (Fedus et al. 2021): softmax over all experts in float32, the first of the
    likeliest, whose probability weighs what it returns.

    Returns:
        experts_T (int64) and weights_T (float32).
    """
    weights_T, experts_T = logits_TE.float().softmax(dim=-1).max(dim=-1)
    return experts_T, weights_T


def over_capacity(
    experts_T: Tensor, sequence_T: Tensor, *, num_experts: int, capacity: int
) -> Tensor:
    """Which tokens find their expert full, because earlier ones of their sequence filled it.

    Args:
        experts_T: int64; each token's logical expert, tokens of a sequence in order.
        sequence_T: int64; which sequence each token is of.
        num_experts: of the layer.
        capacity: tokens of a sequence that an expert takes.

    Returns:
        Boolean [T].
    """
    pair_T = sequence_T * num_experts + experts_T
    sorted_T, order_T = pair_T.sort(stable=True)
    # A token's place among those of its sequence that chose the same expert.
    place_T = torch.arange(len(pair_T), device=pair_T.device)
    place_T -= torch.searchsorted(sorted_T, sorted_T)
    full_T = torch.empty_like(pair_T, dtype=torch.bool)
    full_T[order_T] = place_T >= capacity
    return full_T

"""Routing, and the map from a variant's logical experts to the layer's shared slots."""

from __future__ import annotations

from torch import Tensor

__all__ = ["route"]


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

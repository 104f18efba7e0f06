"""One layer of all variants at a time: reading it, and deciding what shares a slot in it.

One buffer holds the layer's experts and is reused for every layer; it is the most that the compiler
ever holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.clustering import cluster_labels, identity_labels
from moeconsolidate.plan import LayerPlan, Recipe
from moeconsolidate.similarity import check_rows, cosine_similarity
from moeruntime.errors import ResourceError

__all__ = ["LayerReader"]


class LayerReader:
    """The experts of all variants, layer by layer.

    Attributes:
        experts_EP: the layer read last: a row an expert, variant by variant.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint], recipe: Recipe) -> None:
        """Allocate the buffer.

        Raises:
            ResourceError: there is no memory for it.
        """
        self._checkpoints, self._recipe = checkpoints, recipe
        self.experts_EP = _layer_buffer(checkpoints)

    def fill(self, layer: int) -> list[str]:
        """Read a layer; returns for each row a key that is equal for bit-identical experts."""
        return _read_layer(self._checkpoints, layer, self.experts_EP)

    def read(self, layer: int) -> LayerPlan:
        """Read a layer and decide what shares a slot."""
        keys = self.fill(layer)
        labels = _share(self._checkpoints, layer, self.experts_EP, keys, self._recipe)
        for checkpoint in self._checkpoints:
            checkpoint.check_unchanged()
        return LayerPlan.from_labels(layer, labels, self._checkpoints[0].config.num_experts)


def _layer_buffer(checkpoints: Sequence[Checkpoint]) -> Tensor:
    """Memory for one layer's experts of all variants: a row an expert, variant by variant."""
    first = checkpoints[0]
    num_rows = len(checkpoints) * first.config.num_experts
    try:
        return torch.empty(num_rows, first.config.expert_numel, dtype=first.expert_dtype)
    except RuntimeError:
        raise ResourceError(
            f"no memory for one layer of all variants: {num_rows} experts of "
            f"{first.expert_num_bytes / 1e9:.3f} GB; consolidate fewer models at once"
        ) from None


def _read_layer(checkpoints: Sequence[Checkpoint], layer: int, experts_EP: Tensor) -> list[str]:
    """Fill the buffer; returns for each row a key that is equal for bit-identical experts."""
    num_experts = checkpoints[0].config.num_experts

    def read(row: int) -> str:
        idx, expert = divmod(row, num_experts)
        return checkpoints[idx].read_expert(layer, expert, out=experts_EP[row])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(read, range(len(experts_EP))))


def _share(
    checkpoints: Sequence[Checkpoint],
    layer: int,
    experts_EP: Tensor,
    keys: Sequence[str],
    recipe: Recipe,
) -> list[int]:
    """Label the rows: equal labels share a slot."""

    def describe(row: int) -> str:
        idx, expert = divmod(row, checkpoints[0].config.num_experts)
        return f"{checkpoints[idx].folder}: {checkpoints[idx].name}, layer {layer}, expert {expert}"

    if recipe.lossless:
        check_rows(experts_EP, describe=describe)
        return identity_labels(keys)
    return cluster_labels(cosine_similarity(experts_EP, describe=describe), recipe.threshold)

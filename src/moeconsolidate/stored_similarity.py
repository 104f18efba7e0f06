"""How alike the experts of a finished pack are, as it stores them.

Legend: E (rows, one per variant and expert, variant by variant), F (the distinct ones among them),
P (weights of an expert: gate_up | down, flattened).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeconsolidate.clustering import average_linkage as linkage_tree
from moeconsolidate.similarity import cosine_similarity
from moeruntime.errors import ResourceError
from moeruntime.pack import Pack
from moeruntime.pack.manifest import EXPERT_PARTS
from moeruntime.tensorfile import DTYPES

__all__ = [
    "LayerSimilarity",
    "layer_buffer",
    "linkage_tree",
    "pair_statistics",
    "stored_similarity",
]


@dataclass(frozen=True, slots=True)
class LayerSimilarity:
    """How alike the experts of a layer are, as stored.

    Attributes:
        layer: its index.
        same_mean, same_min: over pairs of the same expert number in two variants; None where there
            is one variant only.
        other_max: over pairs of different numbers; None where there is one expert only.
    """

    layer: int
    same_mean: float | None
    same_min: float | None
    other_max: float | None


def layer_buffer(pack: Pack) -> Tensor:
    """Memory for the distinct experts of any one layer."""
    config = pack.manifest.config
    num_rows = max(len(pack.manifest.faces(layer)[0]) for layer in range(config.num_layers))
    dtype = DTYPES[pack.manifest.expert_dtype]
    try:
        return torch.empty(num_rows, config.expert_numel, dtype=dtype)
    except RuntimeError:
        raise ResourceError(
            f"no memory for the {num_rows} distinct experts of one layer, "
            f"{num_rows * config.expert_numel * dtype.itemsize / 1e9:.3f} GB"
        ) from None


def stored_similarity(pack: Pack, layer: int, buffer_FP: Tensor) -> Tensor:
    """Compare a layer's experts; those that are one and the same are read and compared once."""
    faces, faces_of = pack.manifest.faces(layer)
    someone: dict[int, tuple[str, int]] = {}
    for name, row in faces_of.items():
        for expert, face in enumerate(row):
            someone.setdefault(face, (name, expert))
    experts_FP = buffer_FP[: len(faces)]
    for face, (name, expert) in someone.items():
        start = 0
        for part in EXPERT_PARTS:
            weights_N = pack.read_expert(name, layer, expert, part).flatten()
            experts_FP[face, start : start + len(weights_N)] = weights_N
            start += len(weights_N)

    def describe(face: int) -> str:
        name, expert = someone[face]
        return f"{pack.root}: {name}, layer {layer}, expert {expert}"

    similarity_FF = cosine_similarity(experts_FP, describe=describe)
    rows_E = torch.tensor([face for name in faces_of for face in faces_of[name]])
    return similarity_FF[rows_E][:, rows_E]


def pair_statistics(
    layer: int, similarity_EE: NDArray[np.float32], num_variants: int
) -> LayerSimilarity:
    """Sum up a layer's matrix."""
    num_experts = len(similarity_EE) // num_variants
    numbers_E = np.arange(len(similarity_EE)) % num_experts
    same_EE = numbers_E[:, None] == numbers_E
    above_EE = np.triu(np.ones_like(same_EE), 1)
    same, other = similarity_EE[same_EE & above_EE], similarity_EE[~same_EE & above_EE]
    return LayerSimilarity(
        layer,
        same_mean=round(float(same.mean(dtype=np.float64)), 6) if same.size else None,
        same_min=round(float(same.min()), 6) if same.size else None,
        other_max=round(float(other.max()), 6) if other.size else None,
    )

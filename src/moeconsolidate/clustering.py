"""Which experts share a slot. Legend: E (rows, one per variant and expert)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

__all__ = ["average_linkage", "cluster_labels", "identity_labels"]


def cluster_labels(similarity_EE: Tensor, threshold: float) -> list[int]:
    """Cluster by average linkage (SciPy's UPGMA), cut at distance 1 - threshold.

    Two clusters join while the average similarity between their members is at least the threshold.
    Rows of similarity 1 have distance 0 and therefore always join.

    Args:
        similarity_EE: symmetric, in [-1, 1], diagonal 1.
        threshold: in [0, 1].

    Returns:
        One label a row, numbered from 0 by first appearance.
    """
    tree = average_linkage(similarity_EE)
    return identity_labels(fcluster(tree, t=1.0 - threshold, criterion="distance").tolist())


def average_linkage(similarity_EE: Tensor) -> NDArray[np.float64]:
    """The tree that `cluster_labels` cuts, as SciPy's linkage matrix; heights are distances."""
    distance_EE = 1.0 - similarity_EE.double().numpy()
    np.fill_diagonal(distance_EE, 0.0)
    return linkage(squareform(distance_EE, checks=False), method="average")


def identity_labels(keys: Iterable[Hashable]) -> list[int]:
    """Label equal keys alike, numbered from 0 by first appearance."""
    labels: dict[Hashable, int] = {}
    return [labels.setdefault(key, len(labels)) for key in keys]

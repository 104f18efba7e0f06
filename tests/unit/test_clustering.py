from __future__ import annotations

import pytest
import torch

from moeconsolidate.clustering import cluster_labels, identity_labels


def test_cut_at_the_threshold() -> None:
    similarity_EE = torch.tensor(
        [[1.0, 0.1, 0.95, 0.1], [0.1, 1.0, 0.1, 0.6], [0.95, 0.1, 1.0, 0.1], [0.1, 0.6, 0.1, 1.0]]
    )
    assert cluster_labels(similarity_EE, 0.9) == [0, 1, 0, 2]
    assert cluster_labels(similarity_EE, 0.5) == [0, 1, 0, 1]
    assert cluster_labels(similarity_EE, 0.0) == [0, 0, 0, 0]
    assert cluster_labels(similarity_EE, 0.96) == [0, 1, 2, 3]


def test_linkage_is_average() -> None:
    # 2 is near to 1 and far from 0: 0.9 and 0.6 average to 0.75.
    similarity_EE = torch.tensor([[1.0, 0.95, 0.6], [0.95, 1.0, 0.9], [0.6, 0.9, 1.0]])
    assert cluster_labels(similarity_EE, 0.76) == [0, 0, 1]
    assert cluster_labels(similarity_EE, 0.74) == [0, 0, 0]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.99999999, 1.0])
def test_identical_rows_share_at_any_threshold(threshold: float) -> None:
    similarity_EE = torch.full((4, 4), 0.3).fill_diagonal_(1.0)
    similarity_EE[0, 3] = similarity_EE[3, 0] = 1.0
    labels = cluster_labels(similarity_EE, threshold)
    assert labels[0] == labels[3]


def test_opposite_rows_never_share() -> None:
    assert cluster_labels(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), 0.0) == [0, 1]


def test_labels_are_numbered_by_first_appearance() -> None:
    assert identity_labels("cabcab") == [0, 1, 2, 0, 1, 2]

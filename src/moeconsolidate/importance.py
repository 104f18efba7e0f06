"""What an error in an expert's weights costs: the data calibration makes and encoding uses.

To second order, changing a matrix by D raises the loss by

    cost(D) = sum_i b_i D_i A D_i^T        nats per token of calibration text

with A the second moment of the matrix' inputs, each token weighted by its squared loss gradient,
and b_i output i's share of the squared gradients, halved: a Kronecker-factored Fisher (as in
Martens and Grosse 2015) whose output factor is diagonal.

Legend: E experts, R rows (outputs), C columns (inputs); N slots, V members of a slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ExpertStatistics", "Importance", "Statistics"]

FLOOR = 0.1
"""Part of the layer's mean that every expert is given, however rarely calibration routes to it."""

DAMPING = 0.01
"""Part of the mean diagonal that is added to A, so that inputs never seen still count."""


@dataclass(frozen=True, slots=True)
class ExpertStatistics:
    """Of one matrix of all experts of a layer, sums over calibration tokens.

    Attributes:
        inputs_ECC: sum of |d|^2 x x^T, float32: x the matrix' input, d the loss gradient at its
            output.
        outputs_ER: sum of d_i^2.
    """

    inputs_ECC: Tensor
    outputs_ER: Tensor

    @classmethod
    def zeros(cls, num_experts: int, num_rows: int, num_columns: int) -> ExpertStatistics:
        """Nothing counted yet."""
        return cls(
            torch.zeros(num_experts, num_columns, num_columns), torch.zeros(num_experts, num_rows)
        )

    def add(self, expert: int, x_NC: Tensor, gradient_NR: Tensor) -> None:
        """Count N tokens of one expert."""
        squares_NR = gradient_NR.square()
        weighted_NC = x_NC * squares_NR.sum(dim=1, keepdim=True)
        self.inputs_ECC[expert].addmm_(weighted_NC.T, x_NC)
        self.outputs_ER[expert] += squares_NR.sum(dim=0)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What calibration says of one variant.

    Attributes:
        num_tokens: tokens of calibration.
        layers: for each layer, "gate_up" and "down" -> sums over their tokens.
        num_routed_LE: tokens that reached each expert.
    """

    num_tokens: int
    layers: Sequence[Mapping[str, ExpertStatistics]]
    num_routed_LE: Tensor

    def importance(self, layer: int, part: str) -> Importance:
        """The cost factors of one matrix of a layer's experts, as N = E slots of one member."""
        sums = self.layers[layer][part]
        inputs_ECC = sums.inputs_ECC / self.num_tokens
        inputs_ECC = inputs_ECC + FLOOR * inputs_ECC.mean(dim=0)
        mean_E = inputs_ECC.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
        inputs_ECC.diagonal(dim1=-2, dim2=-1).add_(DAMPING * mean_E[:, None])
        outputs_ER = sums.outputs_ER + FLOOR * sums.outputs_ER.mean(dim=0)
        outputs_ER = outputs_ER / (2 * outputs_ER.sum(dim=-1, keepdim=True))
        return Importance(inputs_ECC[:, None], outputs_ER[:, None])


@dataclass(frozen=True, slots=True)
class Importance:
    """The factors of cost(D) for N slots of V members.

    Attributes:
        inputs_NVCC: A, float32, symmetric and positive definite.
        outputs_NVR: b, float32, positive.
    """

    inputs_NVCC: Tensor
    outputs_NVR: Tensor

    def cost(self, error_NVRC: Tensor) -> Tensor:
        """Predicted loss increase [N, V] of errors, nats per token."""
        per_row = ((error_NVRC @ self.inputs_NVCC) * error_NVRC).sum(dim=-1)
        return (per_row * self.outputs_NVR).sum(dim=-1)

    def rows(self, rows_S: Tensor) -> Importance:
        """The same for some of the outputs."""
        return Importance(self.inputs_NVCC, self.outputs_NVR[..., rows_S])

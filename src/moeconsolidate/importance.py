"""What an error in an expert's weights costs: the data calibration makes and encoding uses.

To second order, changing a matrix by D raises the loss by

    cost(D) = sum_i b_i D_i A D_i^T        nats per token of calibration text

with A the second moment of the matrix' inputs, each token weighted by its squared loss gradient,
and b_i output i's share of the squared gradients, halved: a Kronecker-factored Fisher (as in
Martens and Grosse 2015) whose output factor is diagonal.

Legend: E experts, R rows (outputs), C columns (inputs); N slots, V members of a slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["ExpertStatistics", "Importance", "Statistics", "watched_experts"]

FLOOR = 0.1
"""Part of the layer's mean that every expert is given, however rarely calibration routes to it."""

DAMPING = 0.01
"""Part of A's mean diagonal that is added to it, so that inputs never seen still count; and the
least part of b's mean that an output is given."""

LEAST = 1e-20
"""Taken for the mean where no gradient reaches a layer at all: then all weights matter alike."""


SAMPLE_STRIDE = 8
"""Of a watched expert's tokens every so many are kept."""

WATCH_STRIDE = 6
"""Of all experts every so many are watched."""


def watched_experts(layer: int, num_experts: int) -> list[int]:
    """Experts of a layer whose tokens are sampled."""
    return [e for e in range(num_experts) if (layer * num_experts + e) % WATCH_STRIDE == 0]


@dataclass(frozen=True, slots=True)
class ExpertStatistics:
    """Of one matrix of all experts of a layer, sums over calibration tokens.

    Attributes:
        inputs_ECC: sum of |d|^2 x x^T, float32: x the matrix' input, d the loss gradient at its
            output.
        outputs_ER: sum of d_i^2.
        samples: expert -> some of its (x, d), for experts that are watched closely.
    """

    inputs_ECC: Tensor
    outputs_ER: Tensor
    samples: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @classmethod
    def zeros(
        cls, num_experts: int, num_rows: int, num_columns: int, watched: Iterable[int] = ()
    ) -> ExpertStatistics:
        """Nothing counted yet; tokens of `watched` experts will be kept."""
        return cls(
            torch.zeros(num_experts, num_columns, num_columns),
            torch.zeros(num_experts, num_rows),
            {expert: [] for expert in watched},
        )

    def add(self, expert: int, x_NC: Tensor, gradient_NR: Tensor) -> None:
        """Count N tokens of one expert."""
        squares_NR = gradient_NR.square()
        weighted_NC = x_NC * squares_NR.sum(dim=1, keepdim=True)
        self.inputs_ECC[expert].addmm_(weighted_NC.T, x_NC)
        self.outputs_ER[expert] += squares_NR.sum(dim=0)
        if expert in self.samples:
            self.samples[expert].append(
                (x_NC[::SAMPLE_STRIDE].clone(), gradient_NR[::SAMPLE_STRIDE].clone())
            )

    def coherence(self, expert: int, error_RC: Tensor) -> tuple[float, float]:
        """The cost of an error on the sampled tokens, exactly and as `Importance` has it.

        `Importance` takes the outputs' errors for independent. Where a fine-tune's own change is
        lost they are not: they add up to what the fine-tune was trained to do.
        """
        x_NC, gradient_NR = (torch.cat(parts) for parts in zip(*self.samples[expert], strict=True))
        change_NR = x_NC @ error_RC.T
        exact = (gradient_NR * change_NR).sum(dim=1).square().sum() / 2
        squares_NR = gradient_NR.square()
        share_R = squares_NR.sum(dim=0) / squares_NR.sum().clamp_min(1e-30)
        weight_N = squares_NR.sum(dim=1)
        independent = ((change_NR.square() * share_R).sum(dim=1) * weight_N).sum() / 2
        return float(exact), float(independent)


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
        mean_E = inputs_ECC.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp_min(LEAST)
        inputs_ECC.diagonal(dim1=-2, dim2=-1).add_(DAMPING * mean_E[:, None])
        outputs_ER = sums.outputs_ER + FLOOR * sums.outputs_ER.mean(dim=0)
        outputs_ER = outputs_ER.maximum(
            DAMPING * outputs_ER.mean(dim=-1, keepdim=True).clamp_min(LEAST)
        )
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

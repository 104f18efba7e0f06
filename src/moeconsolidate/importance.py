"""What an error in an expert's weights costs: the data calibration makes and encoding uses.

To second order, changing a matrix by D raises the loss by

    cost(D) = sum_i b_i D_i A D_i^T        nats per token of calibration text

with A the second moment of the matrix' inputs, each token weighted by its squared loss gradient,
and b_i output i's share of the squared gradients, halved: a Kronecker-factored Fisher (as in
Martens and Grosse 2015) whose output factor is diagonal. Of wide matrices only blocks along A's
diagonal are kept, which costs C * BLOCK_COLUMNS in place of C * C: inputs of different blocks are
taken for independent.

Legend: E experts, R rows (outputs), C columns (inputs), K columns of a block; N slots, V members of
a slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import overload

import torch
from torch import Tensor

from moeconsolidate.spool import Spool

__all__ = [
    "ExpertStatistics",
    "Importance",
    "SpooledLayers",
    "Statistics",
    "column_blocks",
    "watched_experts",
]

FLOOR = 0.1
"""Part of the layer's mean that every expert is given, however rarely calibration routes to it."""

DAMPING = 0.01
"""Part of A's mean diagonal that is added to it, so that inputs never seen still count; and the
least part of b's mean that an output is given."""

BLOCK_COLUMNS = 1024
"""Second moments are kept between columns of one block of so many, at most."""

LEAST = 1e-20
"""Taken for the mean where no gradient reaches a layer at all: then all weights matter alike."""


SAMPLE_STRIDE = 8
"""Of a watched expert's tokens every so many are kept."""

WATCH_STRIDE = 6
"""Of all experts every so many are watched."""


def watched_experts(layer: int, num_experts: int) -> list[int]:
    """Experts of a layer whose tokens are sampled."""
    return [e for e in range(num_experts) if (layer * num_experts + e) % WATCH_STRIDE == 0]


def column_blocks(num_columns: int) -> list[slice]:
    """Columns cut into as few blocks as the limit allows, as equal as can be."""
    num_blocks = max(1, -(-num_columns // BLOCK_COLUMNS))
    width = max(1, -(-num_columns // num_blocks))
    return [slice(start, min(start + width, num_columns)) for start in range(0, num_columns, width)]


@dataclass(frozen=True, slots=True)
class ExpertStatistics:
    """Of one matrix of all experts of a layer, sums over calibration tokens.

    Attributes:
        inputs_EKK: for each of `column_blocks`, the sum of |d|^2 x x^T, float32: x those columns of
            the matrix' input, d the loss gradient at its output.
        outputs_ER: sum of d_i^2.
        samples: expert -> some of its (x, d), for experts that are watched closely.
    """

    inputs_EKK: tuple[Tensor, ...]
    outputs_ER: Tensor
    samples: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @classmethod
    def zeros(
        cls, num_experts: int, num_rows: int, num_columns: int, watched: Iterable[int] = ()
    ) -> ExpertStatistics:
        """Nothing counted yet; tokens of `watched` experts will be kept."""
        return cls(
            tuple(
                torch.zeros(num_experts, block.stop - block.start, block.stop - block.start)
                for block in column_blocks(num_columns)
            ),
            torch.zeros(num_experts, num_rows),
            {expert: [] for expert in watched},
        )

    def add(self, expert: int, x_NC: Tensor, gradient_NR: Tensor) -> None:
        """Count N tokens of one expert."""
        squares_NR = gradient_NR.square()
        weighted_NC = x_NC * squares_NR.sum(dim=1, keepdim=True)
        for block, sums_EKK in zip(column_blocks(x_NC.shape[1]), self.inputs_EKK, strict=True):
            sums_EKK[expert].addmm_(weighted_NC[:, block].T, x_NC[:, block])
        self.outputs_ER[expert] += squares_NR.sum(dim=0)
        if expert in self.samples:
            self.samples[expert].append(
                (x_NC[::SAMPLE_STRIDE].clone(), gradient_NR[::SAMPLE_STRIDE].clone())
            )

    def whole_moment(self, expert: int) -> Tensor:
        """One expert's second moment as a whole matrix, 0 between blocks."""
        whole_CC: Tensor = torch.block_diag(*(sums_EKK[expert] for sums_EKK in self.inputs_EKK))
        return whole_CC

    def sampled_losses(
        self, expert: int, error_RC: Tensor, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """What an error in some rows does on a watched expert's sampled tokens.

        `Importance` takes the outputs' errors for independent. Where a fine-tune's own change is
        lost they are not: they add up to what the fine-tune was trained to do.

        Returns:
            The first-order change of each token's loss, float32 [N], which adds up over rows and
            whose halved squares are the cost; and that cost as `Importance` has it, float32 [].
        """
        x_NC, gradient_NR = (torch.cat(parts) for parts in zip(*self.samples[expert], strict=True))
        change_NR = x_NC @ error_RC.T
        squares_NR = gradient_NR.square()
        share_R = squares_NR.sum(dim=0) / squares_NR.sum().clamp_min(1e-30)
        weight_N = squares_NR.sum(dim=1)
        independent = ((change_NR.square() * share_R[rows]).sum(dim=1) * weight_N).sum() / 2
        return (gradient_NR[:, rows] * change_NR).sum(dim=1), independent


class SpooledLayers(Sequence[Mapping[str, ExpertStatistics]]):
    """Each layer's sums by part, on disk until they are asked for."""

    def __init__(self, spool: Spool, num_layers: int) -> None:
        """Layers still to be put."""
        self._spool, self._num_layers = spool, num_layers

    def put(self, layer: int, parts: Mapping[str, ExpertStatistics]) -> None:
        """Set a layer's sums aside."""
        fields = {
            part: (sums.inputs_EKK, sums.outputs_ER, sums.samples) for part, sums in parts.items()
        }
        self._spool.put(f"layer-{layer}", fields)

    @overload
    def __getitem__(self, layer: int) -> Mapping[str, ExpertStatistics]: ...
    @overload
    def __getitem__(self, layer: slice) -> list[Mapping[str, ExpertStatistics]]: ...
    def __getitem__(
        self, layer: int | slice
    ) -> Mapping[str, ExpertStatistics] | list[Mapping[str, ExpertStatistics]]:
        """Read a layer's sums back, or several layers'."""
        layers = range(self._num_layers)[layer]
        if isinstance(layers, range):
            return [self[one] for one in layers]
        return {
            part: ExpertStatistics(*fields)
            for part, fields in self._spool.get(f"layer-{layers}").items()
        }

    def __len__(self) -> int:
        """Layers of the model."""
        return self._num_layers


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
        num_columns = sum(sums_EKK.shape[-1] for sums_EKK in sums.inputs_EKK)
        inputs_NVKK, trace_E = [], torch.zeros(len(sums.outputs_ER))
        for sums_EKK in sums.inputs_EKK:
            inputs_EKK = sums_EKK / self.num_tokens
            inputs_EKK += FLOOR * inputs_EKK.mean(dim=0)
            trace_E += inputs_EKK.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
            inputs_NVKK.append(inputs_EKK[:, None])
        damping_E = DAMPING * (trace_E / num_columns).clamp_min(LEAST)
        for block_NVKK in inputs_NVKK:
            block_NVKK.diagonal(dim1=-2, dim2=-1).add_(damping_E[:, None, None])
        outputs_ER = sums.outputs_ER + FLOOR * sums.outputs_ER.mean(dim=0)
        outputs_ER = outputs_ER.maximum(
            DAMPING * outputs_ER.mean(dim=-1, keepdim=True).clamp_min(LEAST)
        )
        outputs_ER = outputs_ER / (2 * outputs_ER.sum(dim=-1, keepdim=True))
        return Importance(tuple(inputs_NVKK), outputs_ER[:, None])


@dataclass(frozen=True, slots=True)
class Importance:
    """The factors of cost(D) for N slots of V members.

    Attributes:
        inputs_NVKK: A, float32, symmetric and positive definite: its blocks, columns in order.
        outputs_NVR: b, float32, positive.
    """

    inputs_NVKK: tuple[Tensor, ...]
    outputs_NVR: Tensor

    @property
    def blocks(self) -> list[tuple[slice, Tensor]]:
        """The columns of each block of A, and the block."""
        widths = [block_NVKK.shape[-1] for block_NVKK in self.inputs_NVKK]
        stops = list(accumulate(widths))
        return [
            (slice(stop - width, stop), block_NVKK)
            for stop, width, block_NVKK in zip(stops, widths, self.inputs_NVKK, strict=True)
        ]

    @property
    def diagonal(self) -> Tensor:
        """A's diagonal, [N, V, C]."""
        diagonals = [block.diagonal(dim1=-2, dim2=-1) for block in self.inputs_NVKK]
        return torch.cat(diagonals, dim=-1)

    def cost(self, error_NVRC: Tensor) -> Tensor:
        """Predicted loss increase [N, V] of errors, nats per token."""
        per_row = torch.zeros_like(self.outputs_NVR)
        for columns, block_NVKK in self.blocks:
            error_NVRK = error_NVRC[..., columns]
            per_row = per_row + ((error_NVRK @ block_NVKK) * error_NVRK).sum(dim=-1)
        return (per_row * self.outputs_NVR).sum(dim=-1)

    def rows(self, rows_S: Tensor | slice) -> Importance:
        """The same for some of the outputs."""
        return Importance(self.inputs_NVKK, self.outputs_NVR[..., rows_S])

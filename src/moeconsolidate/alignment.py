"""Bringing the neurons of experts into the same order, to merge or code them together.

An expert computes the same whatever the order of its neurons: neuron i is row i of gate_proj and of
up_proj, and column i of down_proj. Variants of one ancestor keep its order; others do not, and then
the mean of two of them is neither. The order is found as by "weight matching" in Git Re-Basin
(Ainsworth et al. 2023, https://arxiv.org/abs/2209.04836), which M-SMoE (Li et al. 2024,
https://arxiv.org/abs/2310.01334) does for experts: the permutation that has the largest inner
product with the expert it is to match. As only one dimension is free, one assignment finds it.

Legend: P (weights of an expert), I intermediate, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from moeconsolidate.importance import ExpertStatistics, Statistics, column_blocks
from moeconsolidate.parts import expert_parts
from moeruntime.families import ModelConfig

__all__ = ["neuron_order", "reorder_neurons", "reorder_statistics"]


def neuron_order(expert_P: Tensor, reference_P: Tensor, config: ModelConfig) -> Tensor:
    """The order of an expert's neurons in which it is most like another expert.

    Args:
        expert_P: gate_proj | up_proj | down_proj, flattened.
        reference_P: the expert to match.
        config: their architecture; memory is 8 I^2 bytes, time about I^3.

    Returns:
        order_I, int64: neuron `order_I[i]` belongs in place i.
    """
    from scipy.optimize import linear_sum_assignment  # loads for a while, and is rarely needed

    match_II = torch.zeros(config.intermediate_size, config.intermediate_size)
    for ours, theirs in zip(
        _by_neuron(expert_P, config), _by_neuron(reference_P, config), strict=True
    ):
        match_II.addmm_(theirs.float(), ours.float().T)
    _, order_I = linear_sum_assignment(match_II.numpy(), maximize=True)
    return torch.from_numpy(order_I)


def reorder_neurons(expert_P: Tensor, order_I: Tensor, config: ModelConfig) -> None:
    """Put an expert's neurons into this order, in place."""
    for matrix in _by_neuron(expert_P, config):
        matrix.copy_(matrix[order_I])


def reorder_statistics(
    statistics: Statistics, layer: int, orders: Mapping[int, Tensor]
) -> Statistics:
    """The calibration of a variant, some experts of which were reordered in one layer.

    Neurons are gate_up's outputs, twice over where there is a gate, and down's inputs. Where second
    moments are kept in blocks, what lay between two old blocks is 0 in the new ones too.

    Args:
        statistics: left as it is.
        layer: of the model.
        orders: expert -> order_I.
    """
    parts = dict(statistics.layers[layer])
    gate_up, down = parts["gate_up"], parts["down"]
    outputs_ER = gate_up.outputs_ER.clone()
    inputs_EKK = [moments_EKK.clone() for moments_EKK in down.inputs_EKK]
    blocks = column_blocks(sum(moments_EKK.shape[-1] for moments_EKK in inputs_EKK))
    gate_up_samples, down_samples = dict(gate_up.samples), dict(down.samples)
    for expert, order_I in orders.items():
        matrices = range(0, outputs_ER.shape[1], len(order_I))
        both_R = torch.cat([order_I + start for start in matrices])
        outputs_ER[expert] = outputs_ER[expert, both_R]
        moment_II = down.whole_moment(expert)[order_I][:, order_I]
        for block, moments_EKK in zip(blocks, inputs_EKK, strict=True):
            moments_EKK[expert] = moment_II[block, block]
        if expert in gate_up_samples:
            gate_up_samples[expert] = [(x, d[:, both_R]) for x, d in gate_up_samples[expert]]
            down_samples[expert] = [(x[:, order_I], d) for x, d in down_samples[expert]]
    parts["gate_up"] = ExpertStatistics(gate_up.inputs_EKK, outputs_ER, gate_up_samples)
    parts["down"] = ExpertStatistics(tuple(inputs_EKK), down.outputs_ER, down_samples)
    return replace(statistics, layers=_OneReplaced(statistics.layers, layer, parts))


class _OneReplaced(Sequence[Mapping[str, ExpertStatistics]]):
    """Every layer's sums as they are, but one's; nothing is copied."""

    def __init__(
        self,
        layers: Sequence[Mapping[str, ExpertStatistics]],
        layer: int,
        parts: Mapping[str, ExpertStatistics],
    ) -> None:
        self._layers, self._layer, self._parts = layers, layer, parts

    @overload
    def __getitem__(self, layer: int) -> Mapping[str, ExpertStatistics]: ...
    @overload
    def __getitem__(self, layer: slice) -> list[Mapping[str, ExpertStatistics]]: ...
    def __getitem__(
        self, layer: int | slice
    ) -> Mapping[str, ExpertStatistics] | list[Mapping[str, ExpertStatistics]]:
        layers = range(len(self))[layer]
        if isinstance(layers, range):
            return [self[one] for one in layers]
        return self._parts if layers == self._layer else self._layers[layers]

    def __len__(self) -> int:
        return len(self._layers)


def _by_neuron(expert_P: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    """Views of gate_proj (if there is one), up_proj and down_proj, each with a neuron a row."""
    gate_up, down_HI = expert_parts(expert_P, config)
    return *gate_up.split(config.intermediate_size), down_HI.T

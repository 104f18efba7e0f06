"""From a layer's experts and a plan to the nested codes that are stored; and what bits would cost.

Slots with equally many members are coded together, as many at once as fit a bounded scratch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moeconsolidate.allocation import Unit, options_for
from moeconsolidate.encoding import encode
from moeconsolidate.importance import Importance, Statistics, watched_experts
from moeconsolidate.plan import ExpertRef, LayerPlan
from moeruntime.codes import NestedCode, PrivateCode, nested_bytes, pack_planes, plane_bytes
from moeruntime.families import ModelConfig
from moeruntime.pack.manifest import EXPERT_PARTS

__all__ = ["Coherence", "code_layer", "decode_layer", "layer_units", "nested_format"]

TILE_COLUMNS, SMALL_GROUP = 128, 32
"""A scale covers a kernel's tile of columns where tiles divide the matrix, and few otherwise."""

SCRATCH_WEIGHTS = 2**26
"""Weights (float32, several copies) that are coded at once."""

SAMPLE_STRIDE = 16
"""Costs of options are estimated from every so many rows."""

MAX_COHERENCE = 4.0
"""Errors that cost more than this against independent ones are taken for a small sample's noise."""

Slots = Sequence[Sequence[ExpertRef]]


def nested_format(config: ModelConfig, shared_bits: int) -> dict[str, NestedCode]:
    """How the shared codes of a model's experts are stored."""
    columns = {"gate_up": config.hidden_size, "down": config.intermediate_size}
    return {
        part: NestedCode(shared_bits, SMALL_GROUP if count % TILE_COLUMNS else TILE_COLUMNS)
        for part, count in columns.items()
    }


def code_layer(
    plan: LayerPlan,
    experts_EP: Tensor,
    config: ModelConfig,
    nested: Mapping[str, NestedCode],
    statistics: Sequence[Statistics] | None,
    *,
    num_variants: int,
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Code one layer as its plan says.

    Args:
        plan: slots and private codes.
        experts_EP: the layer's experts, variant by variant.
        config: their architecture.
        nested: how shared codes are stored.
        statistics: each variant's calibration; None rounds to the nearest levels.
        num_variants: of the pack.

    Returns:
        The tensors of the layer's file, and of each variant's private file, by name.
    """
    shared: dict[str, Tensor] = {}
    private: list[dict[str, Tensor]] = [{} for _ in range(num_variants)]
    for idx, part in enumerate(EXPERT_PARTS):
        code = nested[part]
        planes: list[dict[int, Tensor]] = [{}] * len(plan.slots)
        scales: list[Tensor] = [torch.empty(0)] * len(plan.slots)
        for batch in _batches(plan.slots, config):
            members = [plan.slots[slot] for slot in batch]
            codes = [[pair[idx] for pair in plan.codes[slot]] for slot in batch]
            weights_NVRC = _gather(experts_EP, members, part, config)
            importance = statistics and _importance(statistics, plan.layer, part, members)
            result = encode(weights_NVRC, code, codes, importance or None)
            for n, slot in enumerate(batch):
                planes[slot] = pack_planes(result.shared_NRC[n], code.shared_bits)
                scales[slot] = result.scale_NRG[n]
                for v, member in enumerate(members[n]):
                    for width, plane in pack_planes(
                        result.private_NVRC[n, v], codes[n][v].bits
                    ).items():
                        name = f"experts.{member.expert}.{part}.{width}"
                        private[member.variant_idx][name] = plane
        for width in planes[0]:
            shared[f"{part}.{width}"] = torch.stack([plane[width] for plane in planes])
        shared[f"{part}.scale"] = torch.stack(scales)
    return shared, [dict(sorted(tensors.items())) for tensors in private]


def decode_layer(
    plan: LayerPlan,
    experts_EP: Tensor,
    config: ModelConfig,
    nested: Mapping[str, NestedCode],
    statistics: Sequence[Statistics],
) -> list[list[tuple[Tensor, Tensor]]]:
    """Code a layer quickly, without sweeps, and decode it: variant -> expert -> gate_up, down."""
    found: dict[tuple[ExpertRef, str], Tensor] = {}
    for idx, part in enumerate(EXPERT_PARTS):
        for batch in _batches(plan.slots, config):
            members = [plan.slots[slot] for slot in batch]
            codes = [[pair[idx] for pair in plan.codes[slot]] for slot in batch]
            weights_NVRC = _gather(experts_EP, members, part, config)
            importance = _importance(statistics, plan.layer, part, members)
            coded = encode(weights_NVRC, nested[part], codes, importance, sweeps=0)
            for refs, weights_VRC in zip(members, coded.weights_NVRC, strict=True):
                found |= {(ref, part): w for ref, w in zip(refs, weights_VRC, strict=True)}
    return [
        [
            (
                found[ExpertRef(variant, expert), "gate_up"],
                found[ExpertRef(variant, expert), "down"],
            )
            for expert in range(config.num_experts)
        ]
        for variant in range(len(statistics))
    ]


def layer_units(
    layer: int,
    slots: Slots,
    experts_EP: Tensor,
    config: ModelConfig,
    nested: Mapping[str, NestedCode],
    statistics: Sequence[Statistics],
) -> list[Unit]:
    """What each option would cost each member of each slot: gate_up of all slots, then down."""
    units: list[Unit] = []
    for part in EXPERT_PARTS:
        choices = options_for(nested[part].shared_bits)
        found: dict[int, Unit] = {}
        for batch in _batches(slots, config):
            members = [slots[slot] for slot in batch]
            weights_NVRC = _gather(experts_EP, members, part, config)
            num_rows, num_columns = weights_NVRC.shape[-2:]
            rows_S = torch.arange(min(SAMPLE_STRIDE // 2, num_rows - 1), num_rows, SAMPLE_STRIDE)
            sample = weights_NVRC[:, :, rows_S].contiguous()
            importance = _importance(statistics, layer, part, members).rows(rows_S)
            costs_NVO = []
            for option in choices:
                options = [[option] * len(slot) for slot in members]
                coded = encode(sample, nested[part], options, importance, sweeps=0)
                costs_NVO.append(importance.cost(coded.weights_NVRC - sample))
            costs = torch.stack(costs_NVO, dim=-1) * (num_rows / len(rows_S))
            for n, slot in enumerate(batch):
                none = [PrivateCode(0, 0)] * len(members[n])
                found[slot] = Unit(
                    nested_bytes(num_rows, num_columns, nested[part], none),
                    tuple(plane_bytes(num_rows, num_columns, one.bits) for one in choices),
                    tuple(member.variant_idx for member in members[n]),
                    costs[n],
                )
        units += [found[slot] for slot in range(len(slots))]
    return units


class Coherence:
    """How much more errors cost than `Importance` says, for each part, variant and option.

    Watched experts are rounded plainly under every option, and what that costs on sampled tokens is
    compared with what independent outputs would cost.
    """

    def __init__(self, num_variants: int, shared_bits: int) -> None:
        """Nothing compared yet."""
        self._options = options_for(shared_bits)
        shape = (len(EXPERT_PARTS), num_variants, len(self._options))
        self._exact, self._independent = torch.zeros(shape), torch.zeros(shape)

    def watch(
        self,
        layer: int,
        slots: Slots,
        experts_EP: Tensor,
        config: ModelConfig,
        nested: Mapping[str, NestedCode],
        statistics: Sequence[Statistics],
    ) -> None:
        """Compare the watched experts of a layer."""
        watched = watched_experts(layer, config.num_experts)
        for idx, part in enumerate(EXPERT_PARTS):
            for members in (slot for slot in slots if slot[0].expert in watched):
                weights_NVRC = _gather(experts_EP, [members], part, config)
                for number, option in enumerate(self._options):
                    coded = encode(weights_NVRC, nested[part], [[option] * len(members)])
                    errors_VRC = (coded.weights_NVRC - weights_NVRC)[0]
                    for ref, error_RC in zip(members, errors_VRC, strict=True):
                        sums = statistics[ref.variant_idx].layers[layer][part]
                        if sums.samples.get(ref.expert):
                            exact, independent = sums.coherence(ref.expert, error_RC)
                            self._exact[idx, ref.variant_idx, number] += exact
                            self._independent[idx, ref.variant_idx, number] += independent

    def correct(self, units: Sequence[Unit], parts: Sequence[str]) -> list[Unit]:
        """Multiply the costs of units by what was found; `parts` names each unit's part."""
        ratio = (self._exact / self._independent.clamp_min(1e-30)).clamp(1.0, MAX_COHERENCE)
        return [
            replace(
                unit,
                costs_VO=unit.costs_VO * ratio[EXPERT_PARTS.index(part), list(unit.variants)],
            )
            for unit, part in zip(units, parts, strict=True)
        ]


def _batches(slots: Slots, config: ModelConfig) -> Iterator[list[int]]:
    """Slots of equally many members, at most SCRATCH_WEIGHTS of their weights at once."""
    by_size: dict[int, list[int]] = {}
    for slot, members in enumerate(slots):
        by_size.setdefault(len(members), []).append(slot)
    for size, numbers in by_size.items():
        at_once = max(1, SCRATCH_WEIGHTS // (size * config.expert_numel))
        for start in range(0, len(numbers), at_once):
            yield numbers[start : start + at_once]


def _gather(experts_EP: Tensor, slots: Slots, part: str, config: ModelConfig) -> Tensor:
    """Members' matrices [N, V, R, C] in float32."""
    hidden, inner = config.hidden_size, config.intermediate_size
    columns = slice(0, 2 * inner * hidden) if part == "gate_up" else slice(2 * inner * hidden, None)
    width = hidden if part == "gate_up" else inner
    return torch.stack(
        [
            torch.stack(
                [
                    experts_EP[ref.variant_idx * config.num_experts + ref.expert, columns]
                    .float()
                    .view(-1, width)
                    for ref in members
                ]
            )
            for members in slots
        ]
    )


def _importance(
    statistics: Sequence[Statistics], layer: int, part: str, slots: Slots
) -> Importance:
    """Each member's cost factors, as its own variant's calibration has them."""
    of_variant = [one.importance(layer, part) for one in statistics]
    return Importance(
        torch.stack(
            [
                torch.stack([of_variant[r.variant_idx].inputs_NVCC[r.expert, 0] for r in members])
                for members in slots
            ]
        ),
        torch.stack(
            [
                torch.stack([of_variant[r.variant_idx].outputs_NVR[r.expert, 0] for r in members])
                for members in slots
            ]
        ),
    )

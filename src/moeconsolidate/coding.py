"""From a layer's experts and a plan to the nested codes that are stored; and what bits would cost.

Slots with equally many members are coded together, as many, or as many of their rows, as fit a
bounded scratch; such pieces of work run side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeconsolidate.allocation import Unit, options_for
from moeconsolidate.encoding import Feedback, NestedCodes, encode
from moeconsolidate.importance import Importance, Statistics, watched_experts
from moeconsolidate.plan import ExpertRef, LayerPlan
from moeconsolidate.threads import side_by_side
from moeruntime.codes import NestedCode, PrivateCode, nested_bytes, pack_planes, plane_bytes
from moeruntime.families import ModelConfig
from moeruntime.pack.manifest import EXPERT_PARTS

__all__ = ["Coherence", "code_layer", "decode_layer", "layer_units", "nested_format"]

TILE_COLUMNS, SMALL_GROUP = 128, 32
"""A scale covers a kernel's tile of columns where tiles divide the matrix, and few otherwise."""

SCRATCH_WEIGHTS = 2**22
"""Weights (float32) that each thread weighs at once; it holds about fifty copies of so many."""

UNWEIGHED_SCRATCH = 2**19
"""The same where all weights matter alike: rounding them side by side needs no more."""

SAMPLE_STRIDE = 16
"""Costs of options are estimated from every so many rows."""

MAX_COHERENCE = 4.0
"""Errors that cost more than this against independent ones are taken for a small sample's noise."""

Slots = Sequence[Sequence[ExpertRef]]


def nested_format(config: ModelConfig, shared_bits: int) -> dict[str, NestedCode]:
    """How the shared codes of a model's experts are stored."""
    return {
        part: NestedCode(shared_bits, SMALL_GROUP if columns % TILE_COLUMNS else TILE_COLUMNS)
        for part, (_, columns) in config.part_shapes.items()
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

    def code_slots(piece: _Piece) -> list[_PackedSlot]:
        return _pack(piece, experts_EP, config, nested[piece.part], statistics)

    pieces = _pieces(plan, config)
    packed = side_by_side(code_slots, pieces)
    for part in EXPERT_PARTS:
        of_part = {
            slot: one
            for piece, slots in zip(pieces, packed, strict=True)
            for slot, one in zip(piece.slots, slots, strict=True)
            if piece.part == part
        }
        in_order = [of_part[slot] for slot in range(len(plan.slots))]
        for width in in_order[0].shared:
            shared[f"{part}.{width}"] = torch.stack([one.shared[width] for one in in_order])
        shared[f"{part}.scale"] = torch.stack([one.scale for one in in_order])
        for members, one in zip(plan.slots, in_order, strict=True):
            for member, planes in zip(members, one.private, strict=True):
                for width, plane in planes.items():
                    name = f"experts.{member.expert}.{part}.{width}"
                    private[member.variant_idx][name] = plane
    return shared, [dict(sorted(tensors.items())) for tensors in private]


def decode_layer(
    plan: LayerPlan,
    experts_EP: Tensor,
    config: ModelConfig,
    nested: Mapping[str, NestedCode],
    statistics: Sequence[Statistics],
) -> list[list[tuple[Tensor, Tensor]]]:
    """Code a layer quickly, without sweeps, and decode it: variant -> expert -> gate_up, down."""

    def decode_slots(piece: _Piece) -> Tensor:
        coded = _encode(piece, experts_EP, config, nested[piece.part], statistics, sweeps=0)
        return torch.cat([one.weights_NVRC for one in coded], dim=2)

    pieces = _pieces(plan, config)
    found: dict[tuple[ExpertRef, str], Tensor] = {}
    for piece, weights_NVRC in zip(pieces, side_by_side(decode_slots, pieces), strict=True):
        for refs, weights_VRC in zip(piece.members, weights_NVRC, strict=True):
            found |= {(ref, piece.part): w for ref, w in zip(refs, weights_VRC, strict=True)}
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
    plan: LayerPlan,
    experts_EP: Tensor,
    config: ModelConfig,
    nested: Mapping[str, NestedCode],
    statistics: Sequence[Statistics],
) -> list[Unit]:
    """What each option would cost each member of each slot: gate_up of all slots, then down."""

    def try_options(piece: _Piece) -> Tensor:
        choices = options_for(nested[piece.part].shared_bits)
        code, num_rows = nested[piece.part], _num_rows(piece.part, config)
        rows_S = torch.arange(min(SAMPLE_STRIDE // 2, num_rows - 1), num_rows, SAMPLE_STRIDE)
        importance = _importance(statistics, plan.layer, piece.part, piece.members)
        feedback = Feedback.of(importance)
        costs_NVO = torch.zeros(len(piece.slots), len(piece.members[0]), len(choices))
        for rows in rows_S.split(piece.rows_at_once(config)):
            sample = _gather(experts_EP, piece.members, piece.part, config, rows)
            of_rows, feedback_of_rows = importance.rows(rows), feedback.rows(rows)
            for number, option in enumerate(choices):
                options = [[option] * len(slot) for slot in piece.members]
                coded = encode(sample, code, options, of_rows, sweeps=0, feedback=feedback_of_rows)
                costs_NVO[..., number] += of_rows.cost(coded.weights_NVRC - sample)
        return costs_NVO * (num_rows / len(rows_S))

    pieces = _pieces(plan, config)
    found: dict[tuple[str, int], Unit] = {}
    for piece, costs_NVO in zip(pieces, side_by_side(try_options, pieces), strict=True):
        choices = options_for(nested[piece.part].shared_bits)
        num_rows, num_columns = _num_rows(piece.part, config), _num_columns(piece.part, config)
        for slot, members, costs_VO in zip(piece.slots, piece.members, costs_NVO, strict=True):
            none = [PrivateCode(0, 0)] * len(members)
            found[piece.part, slot] = Unit(
                nested_bytes(num_rows, num_columns, nested[piece.part], none),
                tuple(plane_bytes(num_rows, num_columns, one.bits) for one in choices),
                tuple(member.variant_idx for member in members),
                costs_VO,
            )
    return [found[part, slot] for part in EXPERT_PARTS for slot in range(len(plan.slots))]


class Coherence:
    """How much more errors cost than `Importance` says, for each part, variant and number of bits.

    Watched experts are rounded plainly with each number of private bits, and what that costs on
    sampled tokens is compared with what independent outputs would cost.
    """

    def __init__(self, num_variants: int, shared_bits: int) -> None:
        """Nothing compared yet."""
        self._options = options_for(shared_bits)
        shape = (len(EXPERT_PARTS), num_variants, len(self._options))
        self._exact, self._independent = torch.zeros(shape), torch.zeros(shape)

    def watch(
        self,
        plan: LayerPlan,
        experts_EP: Tensor,
        config: ModelConfig,
        nested: Mapping[str, NestedCode],
        statistics: Sequence[Statistics],
    ) -> None:
        """Compare the watched experts of a layer."""
        watched = watched_experts(plan.layer, config.num_experts)
        first_of = {bits: PrivateCode(bits, step) for bits, step in reversed(_pairs(self._options))}

        def compare(item: tuple[str, tuple[ExpertRef, ...], PrivateCode]) -> Tensor:
            part, members, option = item
            return _compare_sampled(
                part, members, option, plan.layer, experts_EP, config, nested[part], statistics
            )

        items = [
            (part, members, option)
            for part in EXPERT_PARTS
            for members in plan.slots
            if members[0].expert in watched
            for option in first_of.values()
        ]
        for (part, members, option), costs_V2 in zip(
            items, side_by_side(compare, items), strict=True
        ):
            numbers = [
                number for number, one in enumerate(self._options) if one.bits == option.bits
            ]
            for member, (exact, independent) in zip(members, costs_V2.tolist(), strict=True):
                at = EXPERT_PARTS.index(part), member.variant_idx, numbers
                self._exact[at] += exact
                self._independent[at] += independent

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


@dataclass(frozen=True, slots=True)
class _Piece:
    """One part of some slots of equally many members, which are coded at once.

    Attributes:
        layer, part, slots: which.
        members: of each slot.
        codes: their private codes, where the plan has any.
    """

    layer: int
    part: str
    slots: tuple[int, ...]
    members: tuple[tuple[ExpertRef, ...], ...]
    codes: tuple[tuple[PrivateCode, ...], ...]

    def rows_at_once(self, config: ModelConfig, scratch: int = SCRATCH_WEIGHTS) -> int:
        """Rows of all of them whose weights fit the scratch."""
        a_row = len(self.slots) * len(self.members[0]) * _num_columns(self.part, config)
        return max(1, scratch // a_row)


def _pieces(plan: LayerPlan, config: ModelConfig) -> list[_Piece]:
    """Cut a layer into pieces of independent work, by what fits the scratch."""
    by_size: dict[int, list[int]] = {}
    for slot, members in enumerate(plan.slots):
        by_size.setdefault(len(members), []).append(slot)
    pieces = []
    for idx, part in enumerate(EXPERT_PARTS):
        for size, numbers in by_size.items():
            a_slot = size * _num_rows(part, config) * _num_columns(part, config)
            at_once = max(1, SCRATCH_WEIGHTS // a_slot)
            for start in range(0, len(numbers), at_once):
                slots = tuple(numbers[start : start + at_once])
                codes = tuple(
                    tuple(pair[idx] for pair in plan.codes[slot]) for slot in slots if plan.codes
                )
                of_slots = tuple(plan.slots[slot] for slot in slots)
                pieces.append(_Piece(plan.layer, part, slots, of_slots, codes))
    return pieces


@dataclass(frozen=True, slots=True)
class _PackedSlot:
    """One part of a slot as it is stored: planes by width, scales, each member's planes."""

    shared: dict[int, Tensor]
    scale: Tensor
    private: list[dict[int, Tensor]]


def _pack(
    piece: _Piece,
    experts_EP: Tensor,
    config: ModelConfig,
    code: NestedCode,
    statistics: Sequence[Statistics] | None,
) -> list[_PackedSlot]:
    """Code a piece and pack it."""
    # What a reader will decode is as large as the weights, and is not stored: let it go.
    coded = [
        (one.shared_NRC, one.private_NVRC, one.scale_NRG)
        for one in _encode(piece, experts_EP, config, code, statistics, sweeps=2)
    ]
    parts = zip(zip(*coded, strict=True), (1, 2, 1), strict=True)
    shared_NRC, private_NVRC, scale_NRG = (torch.cat(part, dim=rows) for part, rows in parts)
    return [
        _PackedSlot(
            pack_planes(shared_NRC[n], code.shared_bits),
            scale_NRG[n],
            [pack_planes(private_NVRC[n, v], one.bits) for v, one in enumerate(codes)],
        )
        for n, codes in enumerate(piece.codes)
    ]


def _encode(
    piece: _Piece,
    experts_EP: Tensor,
    config: ModelConfig,
    code: NestedCode,
    statistics: Sequence[Statistics] | None,
    *,
    sweeps: int,
) -> Iterator[NestedCodes]:
    """Choose the codes of a piece, some rows at a time."""
    importance = statistics and _importance(statistics, piece.layer, piece.part, piece.members)
    feedback = Feedback.of(importance) if importance else None
    scratch = SCRATCH_WEIGHTS if sweeps == 0 or statistics else UNWEIGHED_SCRATCH
    at_once = piece.rows_at_once(config, scratch)
    for rows in torch.arange(_num_rows(piece.part, config)).split(at_once):
        weights_NVRC = _gather(experts_EP, piece.members, piece.part, config, rows)
        yield encode(
            weights_NVRC,
            code,
            piece.codes,
            importance.rows(rows) if importance else None,
            sweeps=sweeps,
            feedback=feedback and feedback.rows(rows),
        )


def _compare_sampled(
    part: str,
    members: tuple[ExpertRef, ...],
    option: PrivateCode,
    layer: int,
    experts_EP: Tensor,
    config: ModelConfig,
    code: NestedCode,
    statistics: Sequence[Statistics],
) -> Tensor:
    """Exact and independent cost [V, 2] of rounding a slot's members plainly."""
    sums = [statistics[ref.variant_idx].layers[layer][part] for ref in members]
    piece = _Piece(layer, part, (0,), (members,), ((option,) * len(members),))
    changes: list[Tensor] = [torch.zeros(())] * len(members)
    costs_V2 = torch.zeros(len(members), 2)
    start = 0
    for coded in _encode(piece, experts_EP, config, code, None, sweeps=0):
        rows = slice(start, start + coded.weights_NVRC.shape[2])
        start = rows.stop
        weights_NVRC = _gather(
            experts_EP, piece.members, part, config, torch.arange(rows.start, rows.stop)
        )
        for v, error_RC in enumerate((coded.weights_NVRC - weights_NVRC)[0]):
            if sums[v].samples.get(members[v].expert):
                change_N, independent = sums[v].sampled_losses(members[v].expert, error_RC, rows)
                changes[v] = changes[v] + change_N
                costs_V2[v, 1] += independent
    costs_V2[:, 0] = torch.stack([change_N.square().sum() / 2 for change_N in changes])
    return costs_V2


def _pairs(options: Sequence[PrivateCode]) -> list[tuple[int, int]]:
    return [(one.bits, one.step) for one in options]


def _num_rows(part: str, config: ModelConfig) -> int:
    return config.part_shapes[part][0]


def _num_columns(part: str, config: ModelConfig) -> int:
    return config.part_shapes[part][1]


def _gather(
    experts_EP: Tensor, slots: Slots, part: str, config: ModelConfig, rows: Tensor
) -> Tensor:
    """Some rows of members' matrices, [N, V, R, C] in float32."""
    columns, width = config.part_columns(part), _num_columns(part, config)
    return torch.stack(
        [
            torch.stack(
                [
                    experts_EP[ref.variant_idx * config.num_experts + ref.expert, columns]
                    .view(-1, width)[rows]
                    .float()
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

    def of_members(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(
            [
                torch.stack([tensors[ref.variant_idx][ref.expert, 0] for ref in members])
                for members in slots
            ]
        )

    return Importance(
        tuple(
            of_members(blocks)
            for blocks in zip(*(one.inputs_NVKK for one in of_variant), strict=True)
        ),
        of_members([one.outputs_NVR for one in of_variant]),
    )

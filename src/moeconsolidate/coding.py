"""From a layer's experts and a plan to the nested codes that are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeconsolidate.importance import Statistics
from moeconsolidate.pieces import Piece, encode_piece, pieces_of
from moeconsolidate.plan import ExpertRef, LayerPlan
from moeconsolidate.threads import side_by_side
from moeruntime.codes import NestedCode, decode, pack_planes, plane_shapes, unpack_planes
from moeruntime.families import ModelConfig
from moeruntime.pack.manifest import EXPERT_PARTS

__all__ = ["code_layer", "decode_layer", "nested_format", "stored_weights"]

TILE_COLUMNS, SMALL_GROUP = 128, 32
"""A scale covers a kernel's tile of columns where tiles divide the matrix, and few otherwise."""


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
    correct_downs: Callable[[list[list[Tensor]]], None] | None = None,
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Code one layer as its plan says: all gate_up, then all down.

    Args:
        plan: slots and private codes.
        experts_EP: the layer's experts, variant by variant.
        config: their architecture.
        nested: how shared codes are stored.
        statistics: each variant's calibration; None rounds to the nearest levels.
        num_variants: of the pack.
        correct_downs: called between the two, with what will be decoded of gate_up, variant by
            variant and expert by expert; it may change the down matrices among the experts.

    Returns:
        The tensors of the layer's file, and of each variant's private file, by name.
    """
    shared: dict[str, Tensor] = {}
    private: list[dict[str, Tensor]] = [{} for _ in range(num_variants)]

    def code_slots(piece: Piece) -> list[_PackedSlot]:
        return _pack(piece, experts_EP, config, nested[piece.part], statistics)

    for part in EXPERT_PARTS:
        if part == "down" and correct_downs:
            correct_downs(stored_weights(plan, "gate_up", shared, private, config, nested))
        pieces = [piece for piece in pieces_of(plan, config) if piece.part == part]
        of_part = {
            slot: one
            for piece, slots in zip(pieces, side_by_side(code_slots, pieces), strict=True)
            for slot, one in zip(piece.slots, slots, strict=True)
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


def stored_weights(
    plan: LayerPlan,
    part: str,
    shared: Mapping[str, Tensor],
    private: Sequence[Mapping[str, Tensor]],
    config: ModelConfig,
    nested: Mapping[str, NestedCode],
) -> list[list[Tensor]]:
    """What a reader decodes of one part of a layer: variant -> expert -> float32 [R, C].

    Args:
        plan: slots and private codes.
        part: "gate_up" or "down".
        shared: tensors of the layer's file, as `code_layer` returns them.
        private: likewise those of each variant's private file.
        config: the architecture.
        nested: how shared codes are stored.
    """
    num_columns, code, idx = config.part_shapes[part][1], nested[part], EXPERT_PARTS.index(part)
    widths = plane_shapes(1, 1, code.shared_bits)

    def decode_slot(slot: int) -> list[tuple[ExpertRef, Tensor]]:
        planes = {width: shared[f"{part}.{width}"][slot] for width in widths}
        shared_RC = unpack_planes(planes, num_columns)
        found = []
        for ref, pair in zip(plan.slots[slot], plan.codes[slot], strict=True):
            own = {
                width: private[ref.variant_idx][f"experts.{ref.expert}.{part}.{width}"]
                for width in plane_shapes(1, 1, pair[idx].bits)
            }
            private_RC = unpack_planes(own, num_columns) if own else None
            scale_RG = shared[f"{part}.scale"][slot]
            found.append((ref, decode(shared_RC, scale_RG, code, private_RC, pair[idx])))
        return found

    slots = side_by_side(decode_slot, range(len(plan.slots)))
    weights = dict(pair for found in slots for pair in found)
    return [
        [weights[ExpertRef(variant, expert)] for expert in range(config.num_experts)]
        for variant in range(len(private))
    ]


def decode_layer(
    plan: LayerPlan,
    experts_EP: Tensor,
    config: ModelConfig,
    nested: Mapping[str, NestedCode],
    statistics: Sequence[Statistics],
) -> list[list[tuple[Tensor, Tensor]]]:
    """Code a layer quickly, without sweeps, and decode it: variant -> expert -> gate_up, down."""

    def decode_slots(piece: Piece) -> Tensor:
        coded = encode_piece(piece, experts_EP, config, nested[piece.part], statistics, sweeps=0)
        return torch.cat([one.weights_NVRC for one in coded], dim=2)

    pieces = pieces_of(plan, config)
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


@dataclass(frozen=True, slots=True)
class _PackedSlot:
    """One part of a slot as it is stored: planes by width, scales, each member's planes."""

    shared: dict[int, Tensor]
    scale: Tensor
    private: list[dict[int, Tensor]]


def _pack(
    piece: Piece,
    experts_EP: Tensor,
    config: ModelConfig,
    code: NestedCode,
    statistics: Sequence[Statistics] | None,
) -> list[_PackedSlot]:
    """Code a piece and pack it."""
    # What a reader will decode is as large as the weights, and is not stored: let it go.
    coded = [
        (one.shared_NRC, one.private_NVRC, one.scale_NRG)
        for one in encode_piece(piece, experts_EP, config, code, statistics, sweeps=2)
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

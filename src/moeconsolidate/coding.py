"""From a layer's experts and a plan to the nested codes that are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeconsolidate.importance import Statistics
from moeconsolidate.pieces import Piece, encode_piece, pieces_of
from moeconsolidate.plan import ExpertRef, LayerPlan
from moeconsolidate.threads import side_by_side
from moeruntime.codes import NestedCode, pack_planes
from moeruntime.families import ModelConfig
from moeruntime.pack.manifest import EXPERT_PARTS

__all__ = ["code_layer", "decode_layer", "nested_format"]

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

    def code_slots(piece: Piece) -> list[_PackedSlot]:
        return _pack(piece, experts_EP, config, nested[piece.part], statistics)

    pieces = pieces_of(plan, config)
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

"""From a layer's experts and a plan to the nested codes that are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moeconsolidate.importance import Statistics
from moeconsolidate.pieces import Piece, encode_piece, pieces_of
from moeconsolidate.plan import ExpertRef, LayerPlan
from moeconsolidate.threads import side_by_side
from moeruntime.codes import (
    NestedCode,
    decode,
    plane_shapes,
    scale_columns,
    unpack_planes,
)
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
    for idx, part in enumerate(EXPERT_PARTS):
        num_rows, num_columns = shape = config.part_shapes[part]
        for width, size in plane_shapes(*shape, nested[part].shared_bits).items():
            shared[f"{part}.{width}"] = torch.empty(len(plan.slots), *size, dtype=torch.uint8)
        scales = scale_columns(num_columns, nested[part].group)
        shared[f"{part}.scale"] = torch.empty(
            len(plan.slots), num_rows, scales, dtype=torch.bfloat16
        )
        for members, codes in zip(plan.slots, plan.codes, strict=True):
            for member, pair in zip(members, codes, strict=True):
                for width, size in plane_shapes(*shape, pair[idx].bits).items():
                    name = f"experts.{member.expert}.{part}.{width}"
                    private[member.variant_idx][name] = torch.empty(size, dtype=torch.uint8)

    def code_slots(piece: Piece) -> None:
        part, code = piece.part, nested[piece.part]
        start = 0
        for coded in encode_piece(piece, experts_EP, config, code, statistics, sweeps=2):
            rows = slice(start, start + coded.scale_NRG.shape[1])
            start = rows.stop
            for n, slot in enumerate(piece.slots):
                shared[f"{part}.scale"][slot, rows] = coded.scale_NRG[n]
                _pack(coded.shared_NRC[n], code.shared_bits, shared, part, (slot, rows))
                for v, (member, one) in enumerate(
                    zip(piece.members[n], piece.codes[n], strict=True)
                ):
                    name = f"experts.{member.expert}.{part}"
                    mine = private[member.variant_idx]
                    _pack(coded.private_NVRC[n, v], one.bits, mine, name, rows)

    pieces = pieces_of(plan, config)
    if correct_downs is None:
        side_by_side(code_slots, pieces)
    else:
        side_by_side(code_slots, [piece for piece in pieces if piece.part == "gate_up"])
        correct_downs(stored_weights(plan, "gate_up", shared, private, config, nested))
        side_by_side(code_slots, [piece for piece in pieces if piece.part == "down"])
    return shared, [dict(sorted(tensors.items())) for tensors in private]


def _pack(
    codes_RC: Tensor,
    bits: int,
    tensors: Mapping[str, Tensor],
    name: str,
    place: slice | tuple[int, slice],
) -> None:
    """`moeruntime.codes.pack_planes` into rows of tensors that are there."""
    from moeconsolidate.kernels.planes import pack_plane

    above = bits
    for width in plane_shapes(1, 1, bits):
        above -= width
        pack_plane(codes_RC.numpy(), above, width, tensors[f"{name}.{width}"][place].numpy())


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

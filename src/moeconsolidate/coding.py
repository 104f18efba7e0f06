"""From a layer's experts and a plan to the nested codes that are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moeconsolidate.coded_layer import CodedLayer
from moeconsolidate.importance import Statistics
from moeconsolidate.pieces import Piece, encode_piece, pieces_of
from moeconsolidate.plan import ExpertRef, LayerPlan
from moeconsolidate.threads import side_by_side
from moeruntime.codes import NestedCode, plane_shapes, scale_columns
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
    correct_downs: Callable[[CodedLayer], None] | None = None,
) -> CodedLayer:
    """Code one layer as its plan says: all gate_up, then all down.

    Args:
        plan: slots and private codes.
        experts_EP: the layer's experts, variant by variant.
        config: their architecture.
        nested: how shared codes are stored.
        statistics: each variant's calibration; None rounds to the nearest levels.
        num_variants: of the pack.
        correct_downs: called between the two, when gate_up of the result is there; it may change
            the down matrices among the experts.
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
    private = [dict(sorted(tensors.items())) for tensors in private]
    layer = CodedLayer(plan, config, nested, shared, private)

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
        correct_downs(layer)
        side_by_side(code_slots, [piece for piece in pieces if piece.part == "down"])
    return layer


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

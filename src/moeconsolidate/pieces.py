"""A layer's experts cut into pieces that are coded at once, in a bounded scratch, side by side.

A piece is one part of some slots that have equally many members: as many, or as many of their rows,
as fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeconsolidate.encoding import Feedback, NestedCodes, encode
from moeconsolidate.importance import Importance, Statistics
from moeconsolidate.plan import ExpertRef, LayerPlan
from moeruntime.codes import NestedCode, PrivateCode
from moeruntime.families import ModelConfig
from moeruntime.pack.manifest import EXPERT_PARTS

__all__ = [
    "SCRATCH_WEIGHTS",
    "UNWEIGHED_SCRATCH",
    "Piece",
    "encode_piece",
    "gather",
    "importance_of",
    "pieces_of",
]

SCRATCH_WEIGHTS = 2**21
"""Weights (float32) that each thread weighs at once; it holds several copies of so many."""

UNWEIGHED_SCRATCH = 2**19
"""The same where all weights matter alike, so that what a thread looks at stays near."""

Slots = Sequence[Sequence[ExpertRef]]


@dataclass(frozen=True, slots=True)
class Piece:
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
        a_row = len(self.slots) * len(self.members[0]) * config.part_shapes[self.part][1]
        return max(1, scratch // a_row)


def pieces_of(plan: LayerPlan, config: ModelConfig) -> list[Piece]:
    """Cut a layer into pieces of independent work, by what fits the scratch."""
    by_size: dict[int, list[int]] = {}
    for slot, members in enumerate(plan.slots):
        by_size.setdefault(len(members), []).append(slot)
    pieces = []
    for idx, part in enumerate(EXPERT_PARTS):
        for size, numbers in by_size.items():
            a_slot = size * math.prod(config.part_shapes[part])
            at_once = max(1, SCRATCH_WEIGHTS // a_slot)
            for start in range(0, len(numbers), at_once):
                slots = tuple(numbers[start : start + at_once])
                codes = tuple(
                    tuple(pair[idx] for pair in plan.codes[slot]) for slot in slots if plan.codes
                )
                of_slots = tuple(plan.slots[slot] for slot in slots)
                pieces.append(Piece(plan.layer, part, slots, of_slots, codes))
    return pieces


def encode_piece(
    piece: Piece,
    experts_EP: Tensor,
    config: ModelConfig,
    code: NestedCode,
    statistics: Sequence[Statistics] | None,
    *,
    sweeps: int,
) -> Iterator[NestedCodes]:
    """Choose the codes of a piece, some rows at a time."""
    importance = statistics and importance_of(statistics, piece.layer, piece.part, piece.members)
    feedback = Feedback.of(importance) if importance else None
    scratch = SCRATCH_WEIGHTS if sweeps == 0 or statistics else UNWEIGHED_SCRATCH
    at_once = piece.rows_at_once(config, scratch)
    num_rows = config.part_shapes[piece.part][0]
    for start in range(0, num_rows, at_once):
        rows = slice(start, min(start + at_once, num_rows))
        weights_NVRC = gather(experts_EP, piece.members, piece.part, config, rows)
        yield encode(
            weights_NVRC,
            code,
            piece.codes,
            importance.rows(rows) if importance else None,
            sweeps=sweeps,
            feedback=feedback and feedback.rows(rows),
        )


def gather(
    experts_EP: Tensor, slots: Slots, part: str, config: ModelConfig, rows: Tensor | slice
) -> Tensor:
    """Some rows of members' matrices, [N, V, R, C] in float32."""
    columns, width = config.part_columns(part), config.part_shapes[part][1]
    matrices_ERC = experts_EP[:, columns].unflatten(1, (-1, width))
    num_rows = len(torch.arange(matrices_ERC.shape[1])[rows])
    weights_NVRC = torch.empty(len(slots), len(slots[0]), num_rows, width)
    for weights_VRC, members in zip(weights_NVRC, slots, strict=True):
        for weights_RC, ref in zip(weights_VRC, members, strict=True):
            weights_RC.copy_(matrices_ERC[ref.variant_idx * config.num_experts + ref.expert, rows])
    return weights_NVRC


def importance_of(
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

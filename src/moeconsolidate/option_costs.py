"""What each private code would cost each member of each slot, on a sample of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moeconsolidate.allocation import Unit, options_for
from moeconsolidate.encoding import Feedback, encode
from moeconsolidate.importance import Statistics, watched_experts
from moeconsolidate.pieces import Piece, encode_piece, gather, importance_of, pieces_of
from moeconsolidate.plan import ExpertRef, LayerPlan
from moeconsolidate.threads import side_by_side
from moeruntime.codes import NestedCode, PrivateCode, nested_bytes, plane_bytes
from moeruntime.families import ModelConfig
from moeruntime.pack.manifest import EXPERT_PARTS

__all__ = ["Coherence", "layer_units"]

SAMPLE_STRIDE = 16
"""Costs of options are estimated from every so many rows."""

MAX_COHERENCE = 4.0
"""Errors that cost more than this against independent ones are taken for a small sample's noise."""


def layer_units(
    plan: LayerPlan,
    experts_EP: Tensor,
    config: ModelConfig,
    nested: Mapping[str, NestedCode],
    statistics: Sequence[Statistics],
) -> list[Unit]:
    """What each option would cost each member of each slot: gate_up of all slots, then down."""

    def try_options(piece: Piece) -> Tensor:
        choices = options_for(nested[piece.part].shared_bits)
        code, num_rows = nested[piece.part], config.part_shapes[piece.part][0]
        rows_S = torch.arange(min(SAMPLE_STRIDE // 2, num_rows - 1), num_rows, SAMPLE_STRIDE)
        importance = importance_of(statistics, plan.layer, piece.part, piece.members)
        feedback = Feedback.of(importance)
        costs_NVO = torch.zeros(len(piece.slots), len(piece.members[0]), len(choices))
        for rows in rows_S.split(piece.rows_at_once(config)):
            sample = gather(experts_EP, piece.members, piece.part, config, rows)
            of_rows, feedback_of_rows = importance.rows(rows), feedback.rows(rows)
            for number, option in enumerate(choices):
                options = [[option] * len(slot) for slot in piece.members]
                coded = encode(sample, code, options, of_rows, sweeps=0, feedback=feedback_of_rows)
                costs_NVO[..., number] += of_rows.cost(coded.weights_NVRC - sample)
        return costs_NVO * (num_rows / len(rows_S))

    pieces = pieces_of(plan, config)
    found: dict[tuple[str, int], Unit] = {}
    for piece, costs_NVO in zip(pieces, side_by_side(try_options, pieces), strict=True):
        choices = options_for(nested[piece.part].shared_bits)
        num_rows, num_columns = config.part_shapes[piece.part]
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
    piece = Piece(layer, part, (0,), (members,), ((option,) * len(members),))
    changes: list[Tensor] = [torch.zeros(())] * len(members)
    costs_V2 = torch.zeros(len(members), 2)
    start = 0
    for coded in encode_piece(piece, experts_EP, config, code, None, sweeps=0):
        rows = slice(start, start + coded.weights_NVRC.shape[2])
        start = rows.stop
        weights_NVRC = gather(
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

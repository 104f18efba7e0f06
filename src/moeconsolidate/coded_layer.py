"""One layer's nested codes on their way into a pack, and what a reader makes of them.

Legend: R rows, C columns, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moeconsolidate.plan import ExpertRef, LayerPlan
from moeruntime.codes import NestedCode, decode_planes, plane_shapes
from moeruntime.families import ModelConfig
from moeruntime.pack.manifest import EXPERT_PARTS

__all__ = ["CodedLayer"]


@dataclass(frozen=True, slots=True)
class CodedLayer:
    """Codes as a pack's files have them.

    Attributes:
        plan: slots and private codes.
        config: the architecture.
        nested: how shared codes are stored, part by part.
        shared: tensors of the layer's file: planes and scales of all slots.
        private: for each variant, tensors of its private file; none where it has no bits.
    """

    plan: LayerPlan
    config: ModelConfig
    nested: Mapping[str, NestedCode]
    shared: Mapping[str, Tensor]
    private: Sequence[Mapping[str, Tensor]]

    def experts(self, variant: int) -> list[tuple[Tensor, Tensor]]:
        """gate_up and down of each of a variant's experts, as `weights` has them."""
        gate_up, down = (self.weights(variant, part) for part in EXPERT_PARTS)
        return list(zip(gate_up, down, strict=True))

    def weights(self, variant: int, part: str) -> list[Tensor]:
        """What a reader decodes of one part of a variant's experts: float32 [R, C] of each."""
        found: dict[int, Tensor] = {}
        for slot, members in enumerate(self.plan.slots):
            for number, ref in enumerate(members):
                if ref.variant_idx == variant:
                    found[ref.expert] = self._decode(slot, number, ref, part)
        return [found[expert] for expert in range(self.config.num_experts)]

    def _decode(self, slot: int, number: int, ref: ExpertRef, part: str) -> Tensor:
        """The slot's codes, refined by those of one of its members."""
        num_columns, code = self.config.part_shapes[part][1], self.nested[part]
        refinement = self.plan.codes[slot][number][EXPERT_PARTS.index(part)]
        planes = {
            width: self.shared[f"{part}.{width}"][slot]
            for width in plane_shapes(1, 1, code.shared_bits)
        }
        own = {
            width: self.private[ref.variant_idx][f"experts.{ref.expert}.{part}.{width}"]
            for width in plane_shapes(1, 1, refinement.bits)
        }
        scale_RG = self.shared[f"{part}.scale"][slot]
        return decode_planes(planes, own, num_columns, scale_RG, code, refinement)

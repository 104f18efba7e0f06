"""What a pack holds and saves, as numbers: for `moec inspect` and the end of `moec consolidate`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moeruntime.pack import Pack
from moeruntime.tensorfile import DTYPES

__all__ = [
    "LayerSummary",
    "PackSummary",
    "SharedSlot",
    "VariantSummary",
    "format_bytes",
    "sharing_lines",
    "summarise",
]


@dataclass(frozen=True, slots=True)
class VariantSummary:
    """One variant.

    Attributes:
        name: its name.
        content_sha256: digest of the model it was made from.
        own_bytes: tensor bytes that are this variant's alone, experts aside.
        separate_bytes: tensor bytes of the variant as a model of its own.
    """

    name: str
    content_sha256: str
    own_bytes: int
    separate_bytes: int


@dataclass(frozen=True, slots=True)
class SharedSlot:
    """A slot that serves several (variant, expert) pairs."""

    slot: int
    members: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One layer.

    Attributes:
        layer: its index.
        num_slots: experts that are stored.
        num_experts: logical experts of all variants.
        shared: the slots that serve more than one expert.
    """

    layer: int
    num_slots: int
    num_experts: int
    shared: tuple[SharedSlot, ...]


@dataclass(frozen=True, slots=True)
class PackSummary:
    """A whole pack; all sizes are bytes of tensors.

    Attributes:
        family: the variants' `model_type`.
        recipe: what the compiler was asked to do.
        variants, layers: in order.
        expert_bytes: of all slots.
        common_bytes: of non-expert tensors that several variants share.
        pack_bytes: of everything in the pack.
        separate_expert_bytes: of the experts, if each variant had its own.
        separate_bytes: of everything, as separate models.
    """

    family: str
    recipe: Mapping[str, Any]
    variants: tuple[VariantSummary, ...]
    layers: tuple[LayerSummary, ...]
    expert_bytes: int
    common_bytes: int
    pack_bytes: int
    separate_expert_bytes: int
    separate_bytes: int

    @property
    def expert_ratio(self) -> float:
        """Stored experts against separate ones, in bytes: 1.0 where nothing is shared."""
        return self.expert_bytes / self.separate_expert_bytes

    @property
    def pack_ratio(self) -> float:
        """The pack against separate models, in bytes."""
        return self.pack_bytes / self.separate_bytes

    def to_json(self) -> dict[str, object]:
        """Plain values, one key a field; and the two ratios."""
        return {
            **asdict(self),
            "expert_ratio": round(self.expert_ratio, 6),
            "pack_ratio": round(self.pack_ratio, 6),
        }


def summarise(pack: Pack) -> PackSummary:
    """Count what an open pack holds; reads nothing but its manifest and headers."""
    manifest, config = pack.manifest, pack.manifest.config
    bytes_by_part = pack.bytes_by_part()
    num_experts = config.num_layers * config.num_experts
    # The next is of one variant, had it experts of its own.
    expert_bytes = num_experts * config.expert_numel * DTYPES[manifest.expert_dtype].itemsize
    shapes = config.non_expert_shapes()
    variants = tuple(
        VariantSummary(
            variant.name,
            variant.content_sha256,
            bytes_by_part[variant.name],
            expert_bytes
            + sum(
                math.prod(shape) * pack.non_expert_dtype(variant.name, role).itemsize
                for role, shape in shapes.items()
            ),
        )
        for variant in manifest.variants
    )
    layers = tuple(
        LayerSummary(
            layer,
            num_slots,
            len(variants) * config.num_experts,
            tuple(
                SharedSlot(slot, tuple(members))
                for slot, members in enumerate(manifest.members(layer))
                if len(members) > 1
            ),
        )
        for layer, num_slots in enumerate(manifest.num_slots)
    )
    return PackSummary(
        family=manifest.family,
        recipe=manifest.recipe,
        variants=variants,
        layers=layers,
        expert_bytes=bytes_by_part["experts"],
        common_bytes=bytes_by_part["common"],
        pack_bytes=sum(bytes_by_part.values()),
        separate_expert_bytes=len(variants) * expert_bytes,
        separate_bytes=sum(variant.separate_bytes for variant in variants),
    )


def sharing_lines(layer: LayerSummary) -> list[str]:
    """One line for all slots that join experts of the same number; the others one by one."""
    aligned: dict[tuple[str, ...], list[int]] = {}
    mixed: list[str] = []
    for slot in layer.shared:
        numbers = {expert for _, expert in slot.members}
        if len(numbers) == 1:
            aligned.setdefault(tuple(name for name, _ in slot.members), []).extend(numbers)
        else:
            mixed.append(" = ".join(f"{name} {expert}" for name, expert in slot.members))
    lines = [
        f"{' = '.join(names)}: {' '.join(map(str, numbers))}" for names, numbers in aligned.items()
    ]
    return lines + mixed


def format_bytes(num_bytes: int) -> str:
    """Three digits in decimal units, as disks and hubs count."""
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if unit != "B" else f"{num_bytes} B"

"""What is shared with what: the decisions the stages of the compiler exchange, as plain data.

Legend of names in this package: E (rows: one per variant and expert, variant by variant), P (the
weights of one expert: gate_proj | up_proj | down_proj, flattened), H (hidden), I (intermediate).

A stage never imports another; it takes and returns these, and `pipeline` passes them on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from moeruntime.errors import InputError, UsageError
from moeruntime.strict_json import Fields, parse_json

__all__ = ["ConsolidationPlan", "ExpertRef", "LayerPlan", "OnProgress", "Progress", "Recipe"]

LOSSLESS_THRESHOLD = 1.0
_CHOICES = {
    "similarity": ("cosine",),
    "signal": ("weights",),
    "linkage": ("average",),
    "merge": ("average",),
}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is: `done` of `total` steps."""

    stage: str
    done: int
    total: int


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the compiler is asked to do, every default written out.

    Attributes:
        threshold: experts share a slot where their average similarity reaches this; 1.0 shares
            bit-identical experts only, and so loses nothing.
        similarity: how two experts are compared.
        signal: what is compared.
        linkage: how the similarity of two clusters follows from their members'.
        merge: how the weights of a slot follow from its members'.
    """

    threshold: float
    similarity: str = "cosine"
    signal: str = "weights"
    linkage: str = "average"
    merge: str = "average"

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UsageError: a value is out of range or unknown.
        """
        # Written so that NaN, which no comparison holds for, is refused as well.
        if not 0.0 <= self.threshold <= 1.0:
            raise UsageError(f"threshold {self.threshold} is outside 0..1")
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise UsageError(f"{name} '{value}' is unknown; known: {', '.join(known)}")

    @property
    def lossless(self) -> bool:
        """Whether every variant comes out of the pack as it went in."""
        return self.threshold == LOSSLESS_THRESHOLD

    def to_json(self) -> dict[str, object]:
        """Plain values, one key a field."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, source: Fields) -> Recipe:
        """Read what `to_json` wrote; unknown keys are errors."""
        recipe = cls(
            threshold=source.number("threshold", 0.0, 1.0),
            **{name: source.text(name) for name in _CHOICES},
        )
        source.done()
        return recipe


@dataclass(frozen=True, slots=True, order=True)
class ExpertRef:
    """A logical expert of one variant; `variant_idx` counts the variants in the order given."""

    variant_idx: int
    expert: int


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Which logical experts of one layer each slot serves: every expert in exactly one slot."""

    layer: int
    slots: tuple[tuple[ExpertRef, ...], ...]

    @classmethod
    def from_labels(cls, layer: int, labels: Sequence[int], num_experts: int) -> LayerPlan:
        """Make the plan that puts row `variant_idx * num_experts + expert` into slot `labels[row]`.

        Args:
            layer: the layer's index.
            labels: one a row, numbered from 0 by first appearance.
            num_experts: experts of one variant.
        """
        slots: list[list[ExpertRef]] = [[] for _ in range(max(labels) + 1)]
        for row, label in enumerate(labels):
            slots[label].append(ExpertRef(*divmod(row, num_experts)))
        return cls(layer, tuple(tuple(members) for members in slots))

    def expert_map(self, variant_idx: int) -> tuple[int, ...]:
        """Logical expert -> slot, for one variant."""
        slot_of = {
            member.expert: slot
            for slot, members in enumerate(self.slots)
            for member in members
            if member.variant_idx == variant_idx
        }
        return tuple(slot_of[expert] for expert in range(len(slot_of)))


@dataclass(frozen=True, slots=True)
class ConsolidationPlan:
    """The whole decision: a recipe and what it led to in each layer."""

    recipe: Recipe
    layers: tuple[LayerPlan, ...]

    @property
    def num_slots(self) -> tuple[int, ...]:
        """Slots of each layer."""
        return tuple(len(layer.slots) for layer in self.layers)

    def to_json(self) -> dict[str, object]:
        """Plain values: slots are lists of [variant_idx, expert]."""
        return {
            "recipe": self.recipe.to_json(),
            "layers": [
                [[[ref.variant_idx, ref.expert] for ref in members] for members in layer.slots]
                for layer in self.layers
            ],
        }

    @classmethod
    def from_json(cls, source: Fields) -> ConsolidationPlan:
        """Read what `to_json` wrote.

        Raises:
            InputError: (as `source` was made to raise) malformed, or an expert is in two slots or
                in none.
        """
        recipe = Recipe.from_json(source.child("recipe"))
        layers = tuple(
            _layer_from_json(source, layer, slots)
            for layer, slots in enumerate(source.sequence("layers"))
        )
        source.done()
        return cls(recipe, layers)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> ConsolidationPlan:
        """Read a JSON document; `where` names it in messages."""
        return cls.from_json(Fields(parse_json(data, where, InputError), where, InputError))


def _layer_from_json(source: Fields, layer: int, slots: object) -> LayerPlan:
    """Read one layer and hold it against the rule that each expert is in one slot."""
    if not isinstance(slots, list) or not slots:
        source.fail(f"layers[{layer}] must be a list of slots")
    members: list[tuple[ExpertRef, ...]] = []
    for slot, pairs in enumerate(slots):
        place = Fields({"slot": pairs}, f"{source.where}: layers[{layer}][{slot}]", InputError)
        refs = []
        for pair in place.sequence("slot"):
            one = Fields({"pair": pair}, place.where, InputError).integers("pair", 0, 2**20)
            if len(one) != 2:
                place.fail("a member must be [variant_idx, expert]")
            refs.append(ExpertRef(*one))
        if not refs:
            place.fail("a slot must have a member")
        members.append(tuple(refs))
    refs = sorted(ref for slot_members in members for ref in slot_members)
    num_experts = 1 + max(ref.expert for ref in refs)
    grid = [ExpertRef(v, e) for v in range(refs[-1].variant_idx + 1) for e in range(num_experts)]
    if len(refs) != len(grid) or refs != grid:
        source.fail(f"layers[{layer}] does not put every expert into exactly one slot")
    return LayerPlan(layer, tuple(members))

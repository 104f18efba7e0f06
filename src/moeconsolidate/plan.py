"""What is shared with what: the decisions the stages of the compiler exchange, as plain data.

Legend of names in this package: E (rows: one per variant and expert, variant by variant), P (the
weights of one expert: gate_proj | up_proj | down_proj, flattened), H (hidden), I (intermediate).

A stage never imports another; it takes and returns these, and `pipeline` passes them on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TypeVar

from moeruntime.codes import PrivateCode
from moeruntime.errors import InputError, UsageError
from moeruntime.pack.manifest import ExpertCodes
from moeruntime.strict_json import Fields, parse_json

__all__ = [
    "LOSSLESS_THRESHOLD",
    "MAX_BUDGET_BYTES",
    "ConsolidationPlan",
    "ExpertRef",
    "LayerPlan",
    "OnProgress",
    "Origin",
    "Progress",
    "Recipe",
]

T = TypeVar("T")

LOSSLESS_THRESHOLD = 1.0
DEFAULT_THRESHOLD = 0.9
MAX_BUDGET_BYTES = 2**62
_CHOICES = {
    "similarity": ("cosine", "cka"),
    "signal": ("weights", "activations"),
    "linkage": ("average",),
    "alignment": ("none", "neurons"),
    "merge": (
        "average",
        "first",
        "frequency-weighted",
        "regmean",
        "round-robin",
        "task-arithmetic",
        "ties",
    ),
    "code": ("nested", "plain"),
    "calibration": ("none", "self", "text"),
}
CALIBRATED_MERGES = ("frequency-weighted", "regmean")
"""Merge rules that need calibration."""

DEFAULT_SHARED_BITS = 4


def default_code(shared_bits: int) -> PrivateCode:
    """Private code where no budget decides: small losses without any data.

    Its steps reach over two of the shared code's, as far as the integers allow.
    """
    return PrivateCode(3, max(1, 2 ** (5 - shared_bits)))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is: `done` of `total`, which count steps unless `unit` says bytes."""

    stage: str
    done: int
    total: int
    unit: str = "steps"


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where on the hub a model is from: "org/name", and the commit, 40 hexadecimal digits."""

    repo: str
    commit: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the compiler is asked to do, every default written out.

    Attributes:
        threshold: experts share a slot where their average similarity reaches this; 1.0 shares
            bit-identical experts only, and where code is "plain" so loses nothing.
        similarity: how two experts are compared: "cosine" or "cka", as `similarity` defines them.
        signal: what is compared: "weights" or "activations", as `signals` defines them.
        linkage: how the similarity of two clusters follows from their members'.
        alignment: "neurons" brings those of a slot's members into one order before they are merged
            or coded; "none" takes experts as they are.
        merge: how the weights of a slot follow from its members', where code is "plain".
        code: "nested" stores a slot's shared bits and each member's private bits; "plain" stores
            one merged expert as it is.
        shared_bits: bits of a weight's shared code, 2 to 6, where code is "nested".
        calibration: what says how much each weight matters: "text" that was given, text sampled
            from each variant it"self", or "none".
        budget_bytes: experts take at most this; None where no budget decides.
        max_loss: predicted loss of the worst variant, nats per token; None where none decides.
        texts: sha256 of each variant's calibration tokens, by name.
    """

    threshold: float
    similarity: str = "cosine"
    signal: str = "weights"
    linkage: str = "average"
    alignment: str = "none"
    merge: str = "average"
    code: str = "plain"
    shared_bits: int = DEFAULT_SHARED_BITS
    calibration: str = "none"
    budget_bytes: int | None = None
    max_loss: float | None = None
    texts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UsageError: a value is out of range or unknown.
        """
        # Written so that NaN, which no comparison holds for, is refused as well.
        if not 0.0 <= self.threshold <= 1.0:
            raise UsageError(f"threshold {self.threshold} is outside 0..1")
        if not 2 <= self.shared_bits <= 6:
            raise UsageError(f"{self.shared_bits} shared bits are outside 2..6")
        if self.budget_bytes is not None and not 1 <= self.budget_bytes <= MAX_BUDGET_BYTES:
            raise UsageError(
                f"budget of {self.budget_bytes} bytes is outside 1..{MAX_BUDGET_BYTES}"
            )
        if self.max_loss is not None and not 0.0 < self.max_loss <= 100.0:
            raise UsageError(f"max loss {self.max_loss} is outside 0..100 nats per token")
        if self.budget_bytes is not None and self.max_loss is not None:
            raise UsageError("give a budget or a max loss, not both: one follows from the other")
        if self.allocated and self.code != "nested":
            raise UsageError("a budget or a max loss chooses bits, which only nested codes have")
        if self.allocated and self.calibration == "none":
            raise UsageError("a budget or a max loss needs calibration, with text or by itself")
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise UsageError(
                    f"{name} {ascii(value[:40])} is unknown; known: {', '.join(known)}"
                )
        if self.merge != "average" and self.code != "plain":
            raise UsageError(f"merge '{self.merge}' makes plain experts, not {self.code} codes")
        if self.merge in CALIBRATED_MERGES and self.calibration == "none":
            raise UsageError(f"merge '{self.merge}' needs calibration, with text or by itself")
        if self.signal == "activations" and self.calibration == "none":
            raise UsageError("signal 'activations' needs calibration, with text or by itself")
        if self.lossless and self.alignment != "none":
            raise UsageError("alignment reorders neurons, and a lossless pack keeps every bit")
        if self.lossless and (self.similarity, self.signal) != ("cosine", "weights"):
            raise UsageError(
                "at threshold 1.0 only bit-identical experts share a slot: there is nothing that "
                "another similarity or signal could decide"
            )

    @property
    def lossless(self) -> bool:
        """Whether every variant comes out of the pack as it went in."""
        return self.threshold == LOSSLESS_THRESHOLD and self.code == "plain"

    @property
    def weighed(self) -> bool:
        """Whether calibration says how much each weight matters, beyond who is alike."""
        return self.calibration != "none" and (
            self.code == "nested" or self.merge in CALIBRATED_MERGES
        )

    @property
    def allocated(self) -> bool:
        """Whether bits are chosen expert by expert."""
        return self.budget_bytes is not None or self.max_loss is not None

    def to_json(self) -> dict[str, object]:
        """Plain values, one key a field."""
        return asdict(self)

    @classmethod
    def from_json(cls, source: Fields) -> Recipe:
        """Read what `to_json` wrote; unknown keys are errors."""
        texts = source.child("texts")
        try:
            recipe = cls(
                threshold=source.number("threshold", 0.0, 1.0),
                **{name: source.text(name) for name in _CHOICES},
                shared_bits=source.integer("shared_bits", 2, 6),
                budget_bytes=_optional(
                    source,
                    "budget_bytes",
                    lambda: source.integer("budget_bytes", 1, MAX_BUDGET_BYTES),
                ),
                max_loss=_optional(
                    source, "max_loss", lambda: source.number("max_loss", 0.0, 100.0)
                ),
                texts={name: texts.text(name) for name in texts.keys()},
            )
        except UsageError as problem:  # here it is the document that makes no sense
            source.fail(str(problem))
        source.done()
        return recipe


@dataclass(frozen=True, slots=True, order=True)
class ExpertRef:
    """A logical expert of one variant; `variant_idx` counts the variants in the order given."""

    variant_idx: int
    expert: int


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Which logical experts of one layer each slot serves: every expert in exactly one slot.

    Attributes:
        layer: the layer's index.
        slots: the members of each.
        codes: the private codes of each slot's each member; empty where weights are stored plain.
    """

    layer: int
    slots: tuple[tuple[ExpertRef, ...], ...]
    codes: tuple[tuple[ExpertCodes, ...], ...] = ()

    def with_codes(self, codes: Sequence[Sequence[ExpertCodes]]) -> LayerPlan:
        """The same slots, with these private codes."""
        return replace(self, codes=tuple(tuple(slot) for slot in codes))

    def private_codes(self, variant_idx: int) -> tuple[ExpertCodes, ...]:
        """Logical expert -> its private codes, for one variant."""
        code_of = {
            member.expert: code
            for members, codes in zip(self.slots, self.codes, strict=True)
            for member, code in zip(members, codes, strict=True)
            if member.variant_idx == variant_idx
        }
        return tuple(code_of[expert] for expert in range(len(code_of)))

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
class Prediction:
    """What an allocation of bits expects.

    Attributes:
        expert_bytes: of all experts, codes and scales.
        losses: predicted loss increase of each variant, nats per token.
    """

    expert_bytes: int
    losses: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ConsolidationPlan:
    """The whole decision: a recipe and what it led to in each layer."""

    recipe: Recipe
    layers: tuple[LayerPlan, ...]
    prediction: Prediction | None = None

    @property
    def num_slots(self) -> tuple[int, ...]:
        """Slots of each layer."""
        return tuple(len(layer.slots) for layer in self.layers)

    def to_json(self) -> dict[str, object]:
        """Plain values: slots are lists of [variant_idx, expert]."""
        return {
            "recipe": self.recipe.to_json(),
            "prediction": None if self.prediction is None else asdict(self.prediction),
            "layers": [
                {
                    "slots": [
                        [[ref.variant_idx, ref.expert] for ref in members]
                        for members in layer.slots
                    ],
                    "codes": [
                        [[[code.bits, code.step] for code in codes] for codes in members]
                        for members in layer.codes
                    ],
                }
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
            _layer_from_json(source, layer, fields)
            for layer, fields in enumerate(source.children("layers"))
        )
        prediction = None
        if source.has("prediction"):
            predicted = source.child("prediction")
            losses = predicted.child("losses")
            prediction = Prediction(
                predicted.integer("expert_bytes", 0, 2**62),
                {name: losses.number(name, 0.0, 1e9) for name in losses.keys()},
            )
            predicted.done()
        source.raw("prediction", None)
        source.done()
        return cls(recipe, layers, prediction)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> ConsolidationPlan:
        """Read a JSON document; `where` names it in messages."""
        return cls.from_json(Fields(parse_json(data, where, InputError), where, InputError))


def _optional(source: Fields, key: str, read: Callable[[], T]) -> T | None:
    return read() if source.has(key) else source.raw(key)


def _codes_from_json(
    fields: Fields, slots: Sequence[Sequence[ExpertRef]]
) -> tuple[tuple[ExpertCodes, ...], ...]:
    """Read the private codes of a layer: none, or a pair for each member."""
    rows = fields.sequence("codes")
    if not rows:
        return ()
    flat = [pair for row in rows if isinstance(row, list) for pair in row]
    if [len(row) if isinstance(row, list) else -1 for row in rows] != [len(s) for s in slots]:
        fields.fail("field 'codes' must have an entry for every member of every slot")
    codes = []
    for pair in flat:
        one = Fields({"codes": pair}, fields.where, InputError)
        numbers = [
            Fields({"code": code}, fields.where, InputError).integers("code", 0, 127)
            for code in one.sequence("codes")
        ]
        values = [PrivateCode(*code) for code in numbers if len(code) == 2]
        if len(numbers) != 2 or len(values) != 2 or not all(code.valid() for code in values):
            fields.fail("a code must be two pairs [bits, step], for gate_up and down")
        codes.append((values[0], values[1]))
    taken = iter(codes)
    return tuple(tuple(next(taken) for _ in slot) for slot in slots)


def _layer_from_json(source: Fields, layer: int, entry: Fields) -> LayerPlan:
    """Read one layer and hold it against the rule that each expert is in one slot."""
    slots = entry.raw("slots")
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
    codes = _codes_from_json(entry, members)
    entry.done()
    return LayerPlan(layer, tuple(members), codes)

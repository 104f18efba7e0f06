"""manifest.json: frozen dataclasses on one side, strict JSON on the other.

docs/format.md describes every field. `manifest_json` checks the document against itself (types,
ranges, references), `reader` against the files' headers, `verify` against their bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeruntime.codes import NestedCode, PrivateCode, plane_bytes, scale_columns
from moeruntime.errors import IntegrityError
from moeruntime.families import FAMILIES, Family, ModelConfig
from moeruntime.strict_json import canonical_json, read_json
from moeruntime.tensorfile import DTYPES

__all__ = [
    "COMMON_FILE",
    "EXPERT_PARTS",
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "SIGNATURE_NAME",
    "ExpertCodes",
    "Face",
    "Manifest",
    "PackedFile",
    "TensorRef",
    "Variant",
    "layer_file",
    "private_file",
    "valid_variant_name",
    "variant_file",
    "variant_folder",
]

FORMAT_VERSION = (0, 3)
"""Major and minor. A reader takes its own major and any minor up to its own."""

FORMAT_NAME = "moec-pack"
MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "model.sig"
"""May lie beside the manifest, which cannot hold its digest; the compiler makes and checks it."""

COMMON_FILE = "variants/common.safetensors"
EXPERT_PARTS = ("gate_up", "down")
"""An expert's two matrices: [2I, H] with the gate rows first, or [I, H] without; and [H, I]."""

ExpertCodes = tuple[PrivateCode, PrivateCode]
"""The private codes of one expert's parts, in the order of EXPERT_PARTS."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED_NAMES = {"common"}


def valid_variant_name(name: str) -> bool:
    """Whether a name can be a folder on any system: letters, digits, '.', '_', '-', at most 64."""
    folded = name.casefold()
    # "a.safetensors" would want for its folder the path that "a" has for its file.
    return (
        bool(_NAME.fullmatch(name))
        and folded not in _RESERVED_NAMES
        and not folded.endswith((".safetensors", "."))
    )


def layer_file(layer: int) -> str:
    """Where one layer's experts are stored."""
    return f"experts/layer-{layer:03d}.safetensors"


def private_file(name: str, layer: int) -> str:
    """Where the private codes of one variant's experts of one layer are stored."""
    return f"private/{name}/layer-{layer:03d}.safetensors"


def variant_file(name: str) -> str:
    """Where the non-expert tensors of one variant alone are stored."""
    return f"variants/{name}.safetensors"


def variant_folder(name: str) -> str:
    """Where a variant's config, tokenizer, chat template and generation config are stored."""
    return f"variants/{name}"


@dataclass(frozen=True, slots=True)
class PackedFile:
    """Size and digest of one file of the pack."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a non-expert tensor is: a file of the pack and a name in it."""

    file: str
    tensor: str


@dataclass(frozen=True, slots=True)
class Variant:
    """One fine-tuned model of the pack.

    Attributes:
        name: unique in the pack, also when case is ignored.
        content_sha256: digest over the names, dtypes, shapes and digests of its source tensors.
        expert_map: [layer][logical expert] -> slot.
        tensors: non-expert role -> where it is stored.
        private_codes: [layer][logical expert] -> how it refines its slot; empty in a plain pack.
    """

    name: str
    content_sha256: str
    expert_map: tuple[tuple[int, ...], ...]
    tensors: Mapping[str, TensorRef]
    private_codes: tuple[tuple[ExpertCodes, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Face:
    """A distinct expert of a layer: a slot, seen through one variant's private codes or none.

    Attributes:
        slot: its slot.
        variant, expert: whose private codes refine it; None where nobody's do.
    """

    slot: int
    variant: str | None = None
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The index of a pack.

    Attributes:
        family: key into FAMILIES.
        config: the architecture all variants share.
        expert_dtype: safetensors dtype name of the experts, as stored or as decoded for export.
        nested: how each part of every expert is coded; None where weights are stored as they are.
        num_slots: slots of each layer's pool.
        variants: in the order they were given.
        files: every file of the pack but the manifest.
        recipe: what the compiler was asked to do, resolved.
        provenance: what compiled it.
    """

    family: str
    config: ModelConfig
    expert_dtype: str
    num_slots: tuple[int, ...]
    variants: tuple[Variant, ...]
    files: Mapping[str, PackedFile]
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    nested: Mapping[str, NestedCode] | None = None

    @property
    def family_spec(self) -> Family:
        """The family's names and rules."""
        return FAMILIES[self.family]

    @property
    def variant_names(self) -> tuple[str, ...]:
        """Names in pack order."""
        return tuple(variant.name for variant in self.variants)

    def members(self, layer: int) -> list[list[tuple[str, int]]]:
        """Which (variant, logical expert) pairs each slot of a layer serves."""
        slots: list[list[tuple[str, int]]] = [[] for _ in range(self.num_slots[layer])]
        for variant in self.variants:
            for expert, slot in enumerate(variant.expert_map[layer]):
                slots[slot].append((variant.name, expert))
        return slots

    def part_shape(self, part: str) -> tuple[int, int]:
        """[rows, columns] of one part of an expert."""
        return self.config.part_shapes[part]

    def coded_bytes(self) -> int:
        """Tensor bytes of all experts of a nested pack: codes and scales, shared and private."""
        assert self.nested is not None
        total = 0
        for idx, part in enumerate(EXPERT_PARTS):
            rows, columns = self.part_shape(part)
            code = self.nested[part]
            shared = plane_bytes(rows, columns, code.shared_bits)
            scales = 2 * rows * scale_columns(columns, code.group)
            total += sum(self.num_slots) * (shared + scales)
            for variant in self.variants:
                for codes in (codes for layer in variant.private_codes for codes in layer):
                    total += plane_bytes(rows, columns, codes[idx].bits)
        return total

    def faces(self, layer: int) -> tuple[list[Face], dict[str, tuple[int, ...]]]:
        """The distinct experts of a layer, and for each variant logical expert -> face.

        In a plain pack, and wherever nobody has private bits, faces are slots.
        """
        numbers: dict[Face, int] = {}
        if self.nested is None:
            numbers = {Face(slot): slot for slot in range(self.num_slots[layer])}
        faces_of = {}
        for variant in self.variants:
            row = []
            for expert, slot in enumerate(variant.expert_map[layer]):
                refined = self.nested is not None and any(
                    code.bits for code in variant.private_codes[layer][expert]
                )
                face = Face(slot, variant.name, expert) if refined else Face(slot)
                row.append(numbers.setdefault(face, len(numbers)))
            faces_of[variant.name] = tuple(row)
        return list(numbers), faces_of

    def face_bytes(self, layer: int, faces: Iterable[Face]) -> int:
        """Bytes that a step reads of these experts: each slot once, and each private code."""
        faces = list(faces)
        slots = {face.slot for face in faces}
        if self.nested is None:
            itemsize = DTYPES[self.expert_dtype].itemsize
            return len(slots) * self.config.expert_numel * itemsize
        total = 0
        for idx, part in enumerate(EXPERT_PARTS):
            rows, columns = self.part_shape(part)
            code = self.nested[part]
            a_slot = plane_bytes(rows, columns, code.shared_bits)
            total += len(slots) * (a_slot + 2 * rows * scale_columns(columns, code.group))
            for variant in self.variants:
                for face in (face for face in faces if face.variant == variant.name):
                    assert face.expert is not None
                    bits = variant.private_codes[layer][face.expert][idx].bits
                    total += plane_bytes(rows, columns, bits)
        return total

    def shared_roles(self) -> frozenset[str]:
        """Non-expert roles for which all variants refer to one and the same tensor."""
        first, *others = self.variants
        return frozenset(
            role
            for role, ref in first.tensors.items()
            if all(other.tensors[role] == ref for other in others)
        )

    def to_bytes(self) -> bytes:
        """The canonical JSON document."""
        return canonical_json(
            {
                "format": FORMAT_NAME,
                "format_version": "{}.{}".format(*FORMAT_VERSION),
                "family": self.family,
                "config": self.config.to_json(),
                "expert_dtype": self.expert_dtype,
                "nested": None
                if self.nested is None
                else {
                    part: {"shared_bits": code.shared_bits, "group": code.group}
                    for part, code in self.nested.items()
                },
                "layers": [
                    {"file": layer_file(layer), "num_slots": num_slots}
                    for layer, num_slots in enumerate(self.num_slots)
                ],
                "variants": [
                    {
                        "name": variant.name,
                        "content_sha256": variant.content_sha256,
                        "expert_map": [list(slots) for slots in variant.expert_map],
                        "tensors": {
                            role: {"file": ref.file, "tensor": ref.tensor}
                            for role, ref in variant.tensors.items()
                        },
                        "private_codes": [
                            [[[code.bits, code.step] for code in codes] for codes in layer]
                            for layer in variant.private_codes
                        ],
                    }
                    for variant in self.variants
                ],
                "files": {
                    path: {"bytes": file.num_bytes, "sha256": file.sha256}
                    for path, file in self.files.items()
                },
                "recipe": dict(self.recipe),
                "provenance": dict(self.provenance),
            }
        )

    @classmethod
    def load(cls, root: Path) -> Manifest:
        """Read and check `root`/manifest.json.

        Raises:
            IntegrityError: the document is missing, malformed, of another major version, or
                contradicts itself.
        """
        path = root / MANIFEST_NAME
        if path.is_symlink():
            raise IntegrityError(f"{path}: a symbolic link; a pack holds regular files only")
        if not path.exists():
            raise IntegrityError(f"{root}: no {MANIFEST_NAME}: not a pack, or one never finished")
        from moeruntime.pack.manifest_json import parse_manifest

        return parse_manifest(read_json(path, IntegrityError))

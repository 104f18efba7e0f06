"""manifest.json: frozen dataclasses on one side, strict JSON on the other.

docs/format.md describes every field. Reading checks the document against itself (types, ranges,
references); `reader` checks it against the files' headers, `verify` against their bytes.
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
from moeruntime.strict_json import Fields, canonical_json, read_json

__all__ = [
    "COMMON_FILE",
    "EXPERT_PARTS",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
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

FORMAT_VERSION = (0, 2)
"""Major and minor. A reader takes its own major and any minor up to its own."""

FORMAT_NAME = "moec-pack"
MANIFEST_NAME = "manifest.json"
COMMON_FILE = "variants/common.safetensors"
MAX_VARIANTS = 1024
EXPERT_PARTS = ("gate_up", "down")
"""An expert's two matrices, [2I, H] with the gate rows first, and [H, I]."""

ExpertCodes = tuple[PrivateCode, PrivateCode]
"""The private codes of one expert's parts, in the order of EXPERT_PARTS."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATH_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # a name and what is added to it
_SHA256 = re.compile(r"[0-9a-f]{64}")
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
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        return (2 * inner, hidden) if part == "gate_up" else (hidden, inner)

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
        return _parse(read_json(path, IntegrityError))


def _parse(source: Fields) -> Manifest:
    if (name := source.text("format")) != FORMAT_NAME:
        source.fail(f"format is {ascii(name[:40])}, not '{FORMAT_NAME}'")
    _check_version(source)
    family = source.text("family")
    if family not in FAMILIES:
        source.fail(f"unknown family {ascii(family[:40])}; known: {', '.join(sorted(FAMILIES))}")
    config = ModelConfig.from_json(source.child("config"))
    files = _parse_files(source.child("files"))
    layers = source.children("layers")
    if len(layers) != config.num_layers:
        source.fail(f"{len(layers)} layers listed, config has {config.num_layers}")
    num_slots = []
    for idx, layer in enumerate(layers):
        if layer.text("file") != layer_file(idx) or layer_file(idx) not in files:
            layer.fail(f"field 'file' must be '{layer_file(idx)}' and listed in 'files'")
        num_slots.append(layer.integer("num_slots", 1, MAX_VARIANTS * config.num_experts))
        layer.done()
    entries = source.children("variants")
    if not 1 <= len(entries) <= MAX_VARIANTS:
        source.fail(f"{len(entries)} variants, outside 1..{MAX_VARIANTS}")
    nested = _parse_nested(source)
    variants = tuple(
        _parse_variant(entry, config, num_slots, files, nested is not None) for entry in entries
    )
    _check_variants(source, variants, num_slots)
    manifest = Manifest(
        family=family,
        config=config,
        expert_dtype=source.text("expert_dtype"),
        num_slots=tuple(num_slots),
        variants=variants,
        files=files,
        recipe=_plain(source.child("recipe")),
        provenance=_plain(source.child("provenance")),
        nested=nested,
    )
    if manifest.expert_dtype not in ("BF16", "F16", "F32"):
        source.fail(f"expert_dtype {ascii(manifest.expert_dtype[:20])} is not BF16, F16 or F32")
    source.done()
    return manifest


def _check_version(source: Fields) -> None:
    version = source.text("format_version")
    match = re.fullmatch(r"([0-9]{1,4})\.([0-9]{1,4})", version)
    if not match:
        source.fail(f"format_version {ascii(version[:20])} is not MAJOR.MINOR")
    major, minor = int(match[1]), int(match[2])
    if major != FORMAT_VERSION[0] or minor > FORMAT_VERSION[1]:
        source.fail(
            f"format_version {version}, this moec reads {FORMAT_VERSION[0]}.0 to "
            f"{FORMAT_VERSION[0]}.{FORMAT_VERSION[1]}; use the moec that wrote it or recompile"
        )


def _parse_files(source: Fields) -> dict[str, PackedFile]:
    files = {}
    for path in source.keys():
        parts = path.split("/")
        if not 1 <= len(parts) <= 3 or not all(_PATH_PART.fullmatch(part) for part in parts):
            source.fail(f"path {ascii(path[:60])} is not allowed in a pack")
        entry = source.child(path)
        sha256 = entry.text("sha256")
        if not _SHA256.fullmatch(sha256):
            entry.fail(f"sha256 {ascii(sha256[:20])} is not 64 lower-case hexadecimal digits")
        files[path] = PackedFile(entry.integer("bytes", 0, 2**60), sha256)
        entry.done()
    if len({path.casefold() for path in files}) != len(files):
        source.fail("two paths differ only in case")
    return files


def _parse_variant(
    source: Fields,
    config: ModelConfig,
    num_slots: list[int],
    files: Mapping[str, PackedFile],
    nested: bool,
) -> Variant:
    name = source.text("name")
    if not valid_variant_name(name):
        source.fail(f"name {ascii(name[:70])} is not a variant name")
    content_sha256 = source.text("content_sha256")
    if not _SHA256.fullmatch(content_sha256):
        source.fail("content_sha256 is not 64 lower-case hexadecimal digits")
    rows = source.sequence("expert_map")
    if len(rows) != config.num_layers:
        source.fail(f"expert_map has {len(rows)} layers, config has {config.num_layers}")
    expert_map = []
    for layer, row in enumerate(rows):
        one = Fields({"slots": row}, f"{source.where}: expert_map[{layer}]", IntegrityError)
        slots = one.integers("slots", 0, num_slots[layer] - 1)
        if len(slots) != config.num_experts:
            one.fail(f"{len(slots)} experts, config has {config.num_experts}")
        expert_map.append(slots)
    table = source.child("tensors")
    roles = config.non_expert_shapes()
    if set(table.keys()) != set(roles):
        odd = sorted(set(table.keys()) ^ set(roles))[0]
        table.fail(f"role {ascii(odd[:60])} is missing or unknown")
    tensors = {}
    for role in roles:
        ref = table.child(role)
        tensors[role] = TensorRef(ref.text("file"), ref.text("tensor"))
        ref.done()
        if tensors[role].file not in (variant_file(name), COMMON_FILE):
            ref.fail(f"file {ascii(tensors[role].file[:60])} does not belong to this variant")
        if tensors[role].file not in files:
            ref.fail(f"file '{tensors[role].file}' is not listed in 'files'")
    private_codes = _parse_private_codes(source, config, nested)
    source.done()
    return Variant(name, content_sha256, tuple(expert_map), tensors, private_codes)


def _parse_nested(source: Fields) -> dict[str, NestedCode] | None:
    if source.raw("nested", None) is None:  # absent in packs of version 0.1
        return None
    parts = source.child("nested")
    nested = {}
    for part in EXPERT_PARTS:
        code = parts.child(part)
        nested[part] = NestedCode(
            shared_bits=code.integer("shared_bits", 2, 6), group=code.integer("group", 8, 2**20)
        )
        code.done()
    parts.done()
    return nested


def _parse_private_codes(
    source: Fields, config: ModelConfig, nested: bool
) -> tuple[tuple[ExpertCodes, ...], ...]:
    layers = source.sequence("private_codes") if source.has("private_codes") else []
    if len(layers) != (config.num_layers if nested else 0):
        source.fail(f"private_codes has {len(layers)} layers")
    result = []
    for layer, experts in enumerate(layers):
        where = f"{source.where}: private_codes[{layer}]"
        if not isinstance(experts, list) or len(experts) != config.num_experts:
            raise IntegrityError(f"{where}: must list {config.num_experts} experts")
        row = []
        for expert, pairs in enumerate(experts):
            one = Fields({"codes": pairs}, f"{where}[{expert}]", IntegrityError)
            codes = tuple(_parse_private_code(one, pair) for pair in one.sequence("codes"))
            if len(codes) != len(EXPERT_PARTS):
                one.fail(f"must hold one [bits, step] for each of {', '.join(EXPERT_PARTS)}")
            row.append((codes[0], codes[1]))
        result.append(tuple(row))
    return tuple(result)


def _parse_private_code(place: Fields, pair: object) -> PrivateCode:
    values = Fields({"pair": pair}, place.where, IntegrityError).integers("pair", 0, 127)
    if len(values) != 2 or not PrivateCode(*values).valid():
        place.fail(f"{list(values)[:4]} is not a private code [bits, step]")
    return PrivateCode(*values)


def _check_variants(source: Fields, variants: Iterable[Variant], num_slots: list[int]) -> None:
    names = [variant.name.casefold() for variant in variants]
    if len(set(names)) != len(names):
        source.fail("two variants have the same name (case is ignored)")
    for layer, count in enumerate(num_slots):
        used = {slot for variant in variants for slot in variant.expert_map[layer]}
        if len(used) != count:
            slot = next(slot for slot in range(count) if slot not in used)
            source.fail(f"slot {slot} of layer {layer} is used by no variant")


def _plain(source: Fields) -> dict[str, Any]:
    return {key: source.raw(key) for key in source.keys()}

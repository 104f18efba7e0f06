"""Reading manifest.json without trust: types, ranges, and references within the document."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from moeruntime.codes import NestedCode, PrivateCode
from moeruntime.errors import IntegrityError
from moeruntime.families import FAMILIES, ModelConfig
from moeruntime.pack.manifest import (
    COMMON_FILE,
    EXPERT_PARTS,
    FORMAT_NAME,
    FORMAT_VERSION,
    ExpertCodes,
    Manifest,
    PackedFile,
    TensorRef,
    Variant,
    layer_file,
    valid_variant_name,
    variant_file,
)
from moeruntime.strict_json import Fields

__all__ = ["parse_manifest"]

MAX_VARIANTS = 1024
_PATH_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # a name and what is added to it
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CODES_IN_BYTES = (0, 3)
"""The first version whose nested codes are in the order of bits that this one reads."""


def parse_manifest(source: Fields) -> Manifest:
    """Check a document against itself and turn it into a manifest.

    Raises:
        IntegrityError: (as `source` was made to raise) it is malformed, of another major version,
            or contradicts itself.
    """
    if (name := source.text("format")) != FORMAT_NAME:
        source.fail(f"format is {ascii(name[:40])}, not '{FORMAT_NAME}'")
    version = _check_version(source)
    family = source.text("family")
    if family not in FAMILIES:
        source.fail(f"unknown family {ascii(family[:40])}; known: {', '.join(sorted(FAMILIES))}")
    config = FAMILIES[family].config_type.from_json(source.child("config"))
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
    if nested is not None and version < _CODES_IN_BYTES:
        source.fail(
            f"format_version {version[0]}.{version[1]} had nested codes in another order of bits; "
            "recompile the pack from its checkpoints"
        )
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


def _check_version(source: Fields) -> tuple[int, int]:
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
    return major, minor


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

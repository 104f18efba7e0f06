"""manifest.json: what is written is what is read, and every structural lie is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeruntime.errors import IntegrityError
from moeruntime.pack.manifest import (
    MANIFEST_NAME,
    Manifest,
    layer_file,
    valid_variant_name,
    variant_file,
)

Document = dict[str, Any]
LAYER = "experts/layer-000.safetensors"


@pytest.fixture(scope="module")
def text(pack: Path) -> str:
    return (pack / MANIFEST_NAME).read_text(encoding="ascii")


def load(folder: Path, text: str | bytes) -> Manifest:
    data = text if isinstance(text, bytes) else text.encode()
    (folder / MANIFEST_NAME).write_bytes(data)
    return Manifest.load(folder)


def test_reading_and_writing_gives_the_same_bytes(pack: Path, lossless_pack: Path) -> None:
    for root in (pack, lossless_pack):
        assert Manifest.load(root).to_bytes() == (root / MANIFEST_NAME).read_bytes()


def test_every_value_reaches_its_field(pack: Path, text: str) -> None:
    manifest, document = Manifest.load(pack), json.loads(text)
    assert manifest.config.to_json() == document["config"]
    assert list(manifest.num_slots) == [layer["num_slots"] for layer in document["layers"]]
    assert manifest.variant_names == ("base", "python", "math", "shell")
    for variant, entry in zip(manifest.variants, document["variants"], strict=True):
        assert [list(row) for row in variant.expert_map] == entry["expert_map"]
        assert variant.content_sha256 == entry["content_sha256"]
        assert {
            role: {"file": ref.file, "tensor": ref.tensor} for role, ref in variant.tensors.items()
        } == entry["tensors"]
    assert {
        path: {"bytes": file.num_bytes, "sha256": file.sha256}
        for path, file in manifest.files.items()
    } == document["files"]
    assert dict(manifest.recipe) == document["recipe"]
    assert dict(manifest.provenance) == document["provenance"]


def test_members_is_the_expert_map_the_other_way_round(pack: Path, lossless_pack: Path) -> None:
    for root in (pack, lossless_pack):
        manifest = Manifest.load(root)
        for layer in range(manifest.config.num_layers):
            members = manifest.members(layer)
            assert len(members) == manifest.num_slots[layer]
            assert all(members)
            for variant in manifest.variants:
                for expert, slot in enumerate(variant.expert_map[layer]):
                    assert (variant.name, expert) in members[slot]
            assert sum(map(len, members)) == len(manifest.variants) * manifest.config.num_experts


# Each is one change that makes a true manifest false, and what the complaint must say.
def put(*path: str | int, value: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    change.__name__ = f"{'.'.join(map(str, path))}={str(value)[:30]}"
    return change


def drop(*path: str | int) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    change.__name__ = f"without {'.'.join(map(str, path))}"
    return change


def rename(old: str, new: str) -> Callable[[Document], None]:
    """Rename a file of the pack."""

    def change(document: Document) -> None:
        document["files"][new] = document["files"].pop(old)

    change.__name__ = f"{old} as {ascii(new[:30])}"
    return change


def swap_layers(document: Document) -> None:
    document["layers"].reverse()


def same_name_twice(document: Document) -> None:
    document["variants"].append(document["variants"][0])


def names_that_differ_in_case(document: Document) -> None:
    entry = json.loads(json.dumps(document["variants"][0]))
    entry["name"] = "BASE"
    for ref in entry["tensors"].values():
        ref["file"] = "variants/BASE.safetensors"
    document["variants"].append(entry)
    document["files"]["variants/BASE.safetensors"] = document["files"]["variants/base.safetensors"]


def a_slot_nobody_uses(document: Document) -> None:
    document["layers"][2]["num_slots"] += 1


def a_slot_used_by_nobody_any_more(document: Document) -> None:
    for variant in document["variants"]:
        row = variant["expert_map"][1]
        variant["expert_map"][1] = [0 if slot == 5 else slot for slot in row]


def another_layer_of_experts(document: Document) -> None:
    document["variants"][1]["expert_map"].append([0] * 8)


def one_expert_too_many(document: Document) -> None:
    document["variants"][1]["expert_map"][3].append(0)


def a_bool_for_a_slot(document: Document) -> None:
    document["variants"][1]["expert_map"][3][0] = True


def a_row_that_is_no_list(document: Document) -> None:
    document["variants"][1]["expert_map"][3] = 7


def a_role_more(document: Document) -> None:
    tensors = document["variants"][0]["tensors"]
    tensors["layers.9.q_proj"] = tensors["layers.0.q_proj"]


LIES: list[tuple[Callable[[Document], None], str]] = [
    (put("format", value="gguf"), "format is 'gguf', not 'moec-pack'"),
    (put("format", value=None), "field 'format' must be a string"),
    (drop("format"), "field 'format' is missing"),
    (put("format_version", value="1.0"), "format_version 1.0, this moec reads 0.0 to 0.3"),
    (put("format_version", value="0.4"), "format_version 0.4, this moec reads"),
    (put("format_version", value="one"), "is not MAJOR.MINOR"),
    (put("format_version", value="0.1.0"), "is not MAJOR.MINOR"),
    (put("format_version", value="-0.1"), "is not MAJOR.MINOR"),
    (put("format_version", value="\u0660.\u0661"), "is not MAJOR.MINOR"),
    (put("format_version", value=0.1), "field 'format_version' must be a string"),
    (put("family", value="llama"), "unknown family 'llama'; known: mixtral"),
    (put("family", value=["mixtral"]), "field 'family' must be a string"),
    (put("surprise", value=1), "unknown field 'surprise'"),
    (put("expert_dtype", value="I8"), "expert_dtype 'I8' is not BF16, F16 or F32"),
    (put("expert_dtype", value="bf16"), "expert_dtype 'bf16'"),
    # The architecture.
    (drop("config", "hidden_size"), "field 'hidden_size' is missing"),
    (put("config", "hidden_size", value=0), "field 'hidden_size' is 0"),
    (put("config", "hidden_size", value=2**40), "field 'hidden_size' is 1099511627776"),
    (put("config", "hidden_size", value=96.0), "field 'hidden_size' must be an integer"),
    (put("config", "hidden_size", value=True), "field 'hidden_size' must be an integer"),
    (put("config", "top_k", value=9), "top_k 9 is more than the 8 experts"),
    (put("config", "num_kv_heads", value=4), "6 attention heads cannot share 4"),
    (put("config", "head_dim", value=15), "head_dim 15 is odd"),
    (put("config", "sliding_window", value=0), "field 'sliding_window' is 0"),
    (put("config", "rope_theta", value=0.5), "field 'rope_theta' is 0.5"),
    (put("config", "rms_norm_eps", value=-1e-5), "field 'rms_norm_eps'"),
    (put("config", "tie_embeddings", value=1), "field 'tie_embeddings' must be true or false"),
    (put("config", "tie_embeddings", value=True), "role 'lm_head' is missing or unknown"),
    (put("config", "surprise", value=1), "unknown field 'surprise'"),
    (put("config", "num_layers", value=5), "4 layers listed, config has 5"),
    (put("config", "num_experts", value=9), "8 experts, config has 9"),
    (put("config", value=[]), "must be a JSON object"),
    # The layers.
    (put("layers", value=[]), "0 layers listed"),
    (put("layers", value={}), "field 'layers' must be a list"),
    (swap_layers, "field 'file' must be 'experts/layer-000.safetensors'"),
    (drop("files", LAYER), "field 'file' must be 'experts/layer-000.safetensors' and listed"),
    (put("layers", 0, "file", value="../../etc/passwd"), "field 'file' must be"),
    (put("layers", 0, "num_slots", value=0), "field 'num_slots' is 0"),
    (put("layers", 0, "num_slots", value=10**9), "field 'num_slots' is 1000000000"),
    (put("layers", 0, "num_slots", value=7), "field 'slots' holds 7, not an integer in 0..6"),
    (put("layers", 0, "surprise", value=1), "unknown field 'surprise'"),
    (a_slot_nobody_uses, "slot 8 of layer 2 is used by no variant"),
    (a_slot_used_by_nobody_any_more, "slot 5 of layer 1 is used by no variant"),
    # The variants.
    (put("variants", value=[]), "0 variants, outside 1..1024"),
    (put("variants", 0, "name", value="../base"), "is not a variant name"),
    (put("variants", 0, "name", value="common"), "'common' is not a variant name"),
    (put("variants", 0, "name", value="other"), "does not belong to this variant"),
    (put("variants", 0, "content_sha256", value="AB" * 32), "content_sha256 is not 64"),
    (put("variants", 0, "surprise", value=1), "unknown field 'surprise'"),
    (same_name_twice, "two variants have the same name"),
    (names_that_differ_in_case, "two paths differ only in case"),
    (drop("variants", 1, "expert_map", 0), "expert_map has 3 layers, config has 4"),
    (another_layer_of_experts, "expert_map has 5 layers, config has 4"),
    (drop("variants", 1, "expert_map", 3, 0), "7 experts, config has 8"),
    (one_expert_too_many, "9 experts, config has 8"),
    (put("variants", 1, "expert_map", 3, 0, value=8), "holds 8, not an integer in 0..7"),
    (put("variants", 1, "expert_map", 3, 0, value=-1), "holds -1, not an integer"),
    (put("variants", 1, "expert_map", 3, 0, value=2**70), "holds 1180591620717411303424"),
    (a_bool_for_a_slot, "holds True, not an integer"),
    (a_row_that_is_no_list, "must be a list"),
    (drop("variants", 0, "tensors", "lm_head"), "role 'lm_head' is missing or unknown"),
    (a_role_more, "role 'layers.9.q_proj' is missing or unknown"),
    (
        put("variants", 0, "tensors", "lm_head", "file", value="variants/math.safetensors"),
        "file 'variants/math.safetensors' does not belong to this variant",
    ),
    (
        put("variants", 0, "tensors", "lm_head", "file", value="../../../etc/passwd"),
        "does not belong to this variant",
    ),
    (
        put("variants", 0, "tensors", "lm_head", "file", value="variants/common.safetensors"),
        "file 'variants/common.safetensors' is not listed in 'files'",
    ),
    (put("variants", 0, "tensors", "lm_head", "surprise", value=1), "unknown field 'surprise'"),
    (drop("variants", 0, "tensors", "lm_head", "tensor"), "field 'tensor' is missing"),
    # The files.
    (put("files", LAYER, "bytes", value=-1), "field 'bytes' is -1"),
    (put("files", LAYER, "bytes", value="888832"), "field 'bytes' must be an integer"),
    (put("files", LAYER, "sha256", value="0" * 63), "is not 64 lower-case hexadecimal digits"),
    (put("files", LAYER, "sha256", value="G" * 64), "is not 64 lower-case hexadecimal digits"),
    (put("files", LAYER, "sha256", value="0" * 64 + "\n"), "is not 64 lower-case hexadecimal"),
    (put("files", LAYER, "surprise", value=1), "unknown field 'surprise'"),
    (rename("README.md", "../README.md"), "is not allowed in a pack"),
    (rename("README.md", "/README.md"), "is not allowed in a pack"),
    (rename("README.md", "a//b"), "is not allowed in a pack"),
    (rename("README.md", "a/./b"), "is not allowed in a pack"),
    (rename("README.md", "a\\b"), "is not allowed in a pack"),
    (rename("README.md", "C:x"), "is not allowed in a pack"),
    (rename("README.md", ".hidden"), "is not allowed in a pack"),
    (rename("README.md", "a/b/c/d"), "is not allowed in a pack"),
    (rename("README.md", ""), "is not allowed in a pack"),
    (rename("README.md", "x\n"), "is not allowed in a pack"),
    (rename("README.md", "a" * 300), "is not allowed in a pack"),
    (rename("README.md", "EXPERTS/layer-000.safetensors"), "two paths differ only in case"),
    (put("recipe", value=None), "must be a JSON object"),
    (put("provenance", value="me"), "must be a JSON object"),
]


@pytest.mark.parametrize(
    ("change", "complaint"), LIES, ids=[change.__name__.replace("\n", "") for change, _ in LIES]
)
def test_every_lie_is_found(
    text: str, tmp_path: Path, change: Callable[[Document], None], complaint: str
) -> None:
    document = json.loads(text)
    change(document)
    with pytest.raises(IntegrityError) as caught:
        load(tmp_path, json.dumps(document))
    message = str(caught.value)
    assert complaint in message
    assert MANIFEST_NAME in message
    assert "\n" not in message


def test_no_field_is_optional(text: str, tmp_path: Path) -> None:
    def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
        # What the compiler writes for people to read may be anything.
        if path[:1] in (("recipe",), ("provenance",), ("files",)):
            return []
        if isinstance(value, list):
            return [p for idx in (0,) for p in places(value[idx], (*path, idx))]
        if not isinstance(value, dict):
            return []
        return [p for key, one in value.items() for p in ((*path, key), *places(one, (*path, key)))]

    found = places(json.loads(text))
    assert len(found) > 60
    for path in found:
        document = json.loads(text)
        drop(*path)(document)
        with pytest.raises(IntegrityError):
            load(tmp_path, json.dumps(document))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"\xff{}", "not UTF-8"),
        (b'{"format": "moec-pack", "format": "moec-pack"}', "duplicate key 'format'"),
        (b'{"format": NaN}', "NaN is not JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_documents_that_are_not_json(tmp_path: Path, data: bytes, complaint: str) -> None:
    with pytest.raises(IntegrityError, match=complaint):
        load(tmp_path, data)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"no manifest\.json: not a pack"):
        Manifest.load(tmp_path)


def test_a_manifest_elsewhere(pack: Path, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).symlink_to(pack / MANIFEST_NAME)
    with pytest.raises(IntegrityError, match="a symbolic link"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("name", ["a", "A9", "my-model_v1.2", "x" * 64, "0", "commons"])
def test_names_a_variant_may_have(name: str) -> None:
    assert valid_variant_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", ".a", "-a", "_a", "a/b", "a\\b", "a b", "a\n", "\n", "ä", "x" * 65,
        "common", "Common", "a.safetensors", "A.SAFETENSORS", "a.", "a:b", "a\0", "٣",
    ],
)  # fmt: skip
def test_names_a_variant_may_not_have(name: str) -> None:
    assert not valid_variant_name(name)


def test_file_names_never_collide() -> None:
    layers = {layer_file(layer) for layer in range(4096)}
    assert len(layers) == 4096
    assert layer_file(7) == "experts/layer-007.safetensors"
    assert variant_file("a") == "variants/a.safetensors"

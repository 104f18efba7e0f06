"""Packs that were damaged, forged or never finished, and what each command says of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostile.attacks import Bounded, Edit, edit_json, flip_bit, forge, one_line
from hostile.conftest import Moec, Refused

pytestmark = pytest.mark.timeout(30)

MANIFEST = "manifest.json"
FILES = (
    "README.md",
    "experts/layer-000.safetensors",
    "experts/layer-001.safetensors",
    "private/a/layer-000.safetensors",
    "private/a/layer-001.safetensors",
    "private/b/layer-000.safetensors",
    "private/b/layer-001.safetensors",
    "variants/a.safetensors",
    "variants/a/config.json",
    "variants/a/tokenizer.json",
    "variants/a/tokenizer_config.json",
    "variants/b.safetensors",
    "variants/b/config.json",
    "variants/b/tokenizer.json",
    "variants/b/tokenizer_config.json",
    "variants/common.safetensors",
)
ASK_B = ("--model", "b", "--prompt", "hi", "--max-tokens", "2", "--quiet")


def test_the_list_of_files_is_complete(bad_pack: Path) -> None:
    assert sorted(json.loads((bad_pack / MANIFEST).read_text())["files"]) == list(FILES)


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [-1, 20], ids=["end", "start"])
@pytest.mark.parametrize("file", FILES)
def test_72_a_flipped_bit(
    file: str, position: int, refused: Refused, moec: Moec, bad_pack: Path
) -> None:
    """verify finds all of them; the others find those in what they read, and never fall over."""
    flip_bit(bad_pack / file, position)
    refused(5, [str(bad_pack / file)], "verify", bad_pack, "--quiet")
    for command in (["inspect", bad_pack], ["run", "--artifact", bad_pack, *ASK_B]):
        code, _, err = moec(*command)
        assert code in (0, 5)
        if code:
            assert str(bad_pack / file) in one_line(err)
    if file.startswith("variants/b/tokenizer"):
        words = [f"{bad_pack / file}: sha256 "]
        refused(5, words, "run", "--artifact", bad_pack, *ASK_B)


@pytest.mark.parametrize("position", range(3, 60, 7))
def test_72_a_flipped_bit_in_the_manifest(position: int, refused: Refused, bad_pack: Path) -> None:
    """The manifest begins with its config, where every digit and letter counts."""
    flip_bit(bad_pack / MANIFEST, position)
    for command in ("verify", "inspect"):
        refused(5, [str(bad_pack / MANIFEST)], command, bad_pack)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change", ["missing", "empty", "longer", "folder", "fifo", "link"])
def test_73_files_that_are_not_as_they_were(
    file: str, change: str, refused: Refused, bad_pack: Path
) -> None:
    path = bad_pack / file
    contents = path.read_bytes()
    path.unlink()
    if change == "empty":
        path.touch()
    elif change == "longer":
        path.write_bytes(contents + b"\0")
    elif change == "folder":
        path.mkdir()
    elif change == "fifo":
        os.mkfifo(path)
    elif change == "link":  # to the same bytes, but who knows for how long
        (bad_pack.parent / "elsewhere").write_bytes(contents)
        path.symlink_to(bad_pack.parent / "elsewhere")
    for command in ("verify", "inspect"):
        refused(5, [str(path)], command, bad_pack)


def test_75_linked_folders(refused: Refused, bad_pack: Path) -> None:
    (bad_pack / "variants").rename(bad_pack.parent / "elsewhere")
    (bad_pack / "variants").symlink_to("../elsewhere")
    words = [f"{bad_pack / 'variants'}: a symbolic link"]
    for command in ("verify", "inspect"):
        refused(5, words, command, bad_pack)


def test_75_a_linked_manifest(refused: Refused, bad_pack: Path) -> None:
    (bad_pack / MANIFEST).rename(bad_pack.parent / "elsewhere")
    (bad_pack / MANIFEST).symlink_to("../elsewhere")
    refused(5, [f"{bad_pack / MANIFEST}: a symbolic link"], "verify", bad_pack)


def test_75_the_pack_itself_may_be_a_link(moec: Moec, bad_pack: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(bad_pack)
    assert moec("verify", tmp_path / "latest", "--quiet")[0] == 0


EXTRA: dict[str, tuple[Callable[[Path], object], str]] = {
    "80-file": (lambda pack: (pack / "notes.txt").touch(), "notes.txt: a file the manifest"),
    "80-hidden-file": (lambda pack: (pack / ".notes").touch(), ".notes: a file the manifest"),
    "80-code": (lambda pack: (pack / "variants" / "a" / "model.py").touch(), "model.py: a file"),
    "80-folder": (lambda pack: (pack / "more").mkdir(), "more: a folder the manifest"),
    "80-fifo": (lambda pack: os.mkfifo(pack / "pipe"), "pipe: a file the manifest"),
    "80-link": (lambda pack: (pack / "more").symlink_to("/etc"), "more: a folder the manifest"),
    "80-dead-link": (lambda pack: (pack / "more").symlink_to("none"), "more: a file the manifest"),
}


@pytest.mark.parametrize("case", EXTRA)
def test_files_too_many(case: str, refused: Refused, moec: Moec, bad_pack: Path) -> None:
    add, complaint = EXTRA[case]
    add(bad_pack)
    refused(5, [complaint], "verify", bad_pack, "--quiet")
    assert moec("inspect", bad_pack)[0] == 0


def test_82_a_pack_never_finished(refused: Refused, bad_pack: Path) -> None:
    (bad_pack / MANIFEST).unlink()
    words = [str(bad_pack), "no manifest.json: not a pack, or one never finished"]
    refused(5, words, "verify", bad_pack)
    refused(5, words, "inspect", bad_pack)
    refused(5, words, "run", "--artifact", bad_pack, *ASK_B)
    refused(5, words, "run", "--artifact", bad_pack, "--prompt", "hi", "--quiet")
    refused(5, [str(bad_pack)], "export", bad_pack, "--model", "b", "--out", bad_pack.parent / "x")


def test_82_no_pack_at_all(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "none", tmp_path / "file"):
        for command in (["verify", place], ["inspect", place], ["run", "--artifact", place]):
            more = ASK_B if command[0] == "run" else ()
            refused(3, [f"{place}: no such pack folder"], *command, *more)


def test_83_a_pack_that_cannot_be_written_to(moec: Moec, bad_pack: Path) -> None:
    places = [bad_pack, *bad_pack.rglob("*")]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    try:
        assert moec("verify", bad_pack, "--quiet")[0] == 0
        assert moec("run", "--artifact", bad_pack, *ASK_B)[0] == 0
    finally:
        for place in places:
            place.chmod(0o755)


@pytest.mark.parametrize("file", ["experts/layer-001.safetensors", "variants/b.safetensors"])
def test_85_a_file_that_shrinks_while_it_is_loaded(
    file: str, refused: Refused, bad_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeruntime import engine

    plan_memory = engine.plan_memory

    def shrink(*args: Any, **kwargs: Any) -> object:
        os.truncate(bad_pack / file, 5000)
        return plan_memory(*args, **kwargs)

    monkeypatch.setattr(engine, "plan_memory", shrink)
    words = [f"{bad_pack / file}: shrank while it was being read"]
    refused(5, words, "run", "--artifact", bad_pack, *ASK_B)


def test_85_a_side_file_that_changes_between_two_requests(
    refused: Refused, bad_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeruntime import prompts

    original = prompts.VariantText

    def change(source: Any, variant: str) -> object:
        if variant == "b":
            flip_bit(bad_pack / "variants" / "b" / "config.json", 5)
        return original(source, variant)

    monkeypatch.setattr(prompts, "VariantText", change)
    asked = tmp_path / "prompts.jsonl"
    asked.write_text('{"model": "a", "prompt": "x"}\n{"model": "b", "prompt": "x"}\n')
    words = [f"{bad_pack}/variants/b/config.json: sha256"]
    refused(5, words, "run", "--artifact", bad_pack, "--prompts", asked, "--quiet")


# -- forgery ---------------------------------------------------------------------------------------


def at(*path: str | int) -> Callable[[object], Edit]:
    """at("a", 0, "b")(value) sets document["a"][0]["b"]; `...` removes it."""
    *folders, last = path

    def to(value: object) -> Edit:
        def edit(document: Any) -> None:
            for key in folders:
                document = document[key]
            if value is ...:
                del document[last]
            else:
                document[last] = value

        return edit

    return to


def another_file(path: str) -> Edit:
    return lambda m: m["files"].update({path: {"bytes": 0, "sha256": "0" * 64}})


def all_slots(value: object) -> Edit:
    return at("variants", 1, "expert_map", 0)([value] * 4)


def codes(value: object) -> Edit:
    """The private codes of one expert."""
    return at("variants", 0, "private_codes", 0, 0)(value)


LAYER = "experts/layer-000.safetensors"
EMBEDDING = ("variants", 1, "tensors", "embed_tokens")
O_PROJ = ("variants", 1, "tensors", "layers.0.o_proj")

FORGERIES: dict[str, tuple[Edit, str]] = {
    "73-size-too-large": (lambda m: m["files"][LAYER].update(bytes=10**6), "bytes, the manifest"),
    "73-size-negative": (at("files", LAYER, "bytes")(-1), "'bytes' is -1"),
    "73-size-a-string": (at("files", LAYER, "bytes")("8"), "'bytes' must be an integer"),
    "73-size-missing": (at("files", LAYER, "bytes")(...), "'bytes' is missing"),
    "74-upper-case": (at("files", LAYER, "sha256")("A" * 64), "is not 64 lower-case"),
    "74-short": (at("files", LAYER, "sha256")("a" * 63), "is not 64 lower-case"),
    "74-long": (at("files", LAYER, "sha256")("a" * 65), "is not 64 lower-case"),
    "74-not-hexadecimal": (at("files", LAYER, "sha256")("g" * 64), "is not 64 lower-case"),
    "74-with-prefix": (at("files", LAYER, "sha256")("sha256:" + "a" * 64), "is not 64 lower-case"),
    "74-line-break": (at("files", LAYER, "sha256")("a" * 64 + "\n"), "is not 64 lower-case"),
    "74-number": (at("files", LAYER, "sha256")(5), "'sha256' must be a string"),
    "74-of-a-variant": (at("variants", 0, "content_sha256")("x"), "content_sha256 is not 64"),
    "75-climbs": (another_file("../outside"), "'../outside' is not allowed in a pack"),
    "75-climbs-inside": (another_file("variants/../../x"), "is not allowed in a pack"),
    "75-absolute": (another_file("/etc/passwd"), "'/etc/passwd' is not allowed in a pack"),
    "75-backslash": (another_file("..\\x"), "is not allowed in a pack"),
    "75-dot": (another_file("./x"), "'./x' is not allowed in a pack"),
    "75-empty": (another_file(""), "'' is not allowed in a pack"),
    "75-double-slash": (another_file("variants//x"), "is not allowed in a pack"),
    "75-nul": (another_file("x\0y"), r"'x\x00y' is not allowed in a pack"),
    "75-differ-in-case": (another_file("readme.md"), "two paths differ only in case"),
    "75-tensor-file-outside": (at(*EMBEDDING, "file")("../x"), "does not belong to this variant"),
    "75-layer-file-outside": (at("layers", 0, "file")("../x"), "field 'file' must be 'experts/"),
    "75-variant-name": (at("variants", 0, "name")("../a"), "name '../a' is not a variant name"),
    "75-variant-name-reserved": (at("variants", 0, "name")("common"), "is not a variant name"),
    "75-variant-twice": (lambda m: m["variants"].append(m["variants"][0]), "have the same name"),
    "77-next-major": (at("format_version")("1.0"), "format_version 1.0, this moec reads 0.0 to"),
    "77-next-minor": (at("format_version")("0.99"), "format_version 0.99, this moec reads"),
    "77-no-version": (at("format_version")("new"), "'new' is not MAJOR.MINOR"),
    "77-version-with-digits-of-elsewhere": (at("format_version")("\u0660.1"), "MAJOR.MINOR"),
    "77-version-a-number": (at("format_version")(0.1), "'format_version' must be a string"),
    "77-another-format": (at("format")("zip"), "format is 'zip', not 'moec-pack'"),
    "77-unknown-family": (at("family")("llama"), "unknown family 'llama'; known: mixtral"),
    "77-unknown-field": (at("license")("x"), "unknown field 'license'"),
    "78-slot-out-of-range": (all_slots(8), "expert_map[0]: field 'slots' holds 8"),
    "78-slot-negative": (all_slots(-1), "expert_map[0]: field 'slots' holds -1"),
    "78-slot-beyond-64-bits": (all_slots(2**70), "field 'slots' holds 1180591620717411303424"),
    "78-slot-a-string": (all_slots("0"), "field 'slots' holds '0'"),
    "78-slot-a-boolean": (all_slots(True), "field 'slots' holds True"),
    "78-slot-a-fraction": (all_slots(0.5), "field 'slots' holds 0.5"),
    "78-slots-unused": (all_slots(0), "slot 4 of layer 0 is used by no variant"),
    "78-slots-too-many": (at("layers", 0, "num_slots")(9), "slot 8 of layer 0 is used by no"),
    "78-slots-too-few": (at("layers", 0, "num_slots")(7), "field 'slots' holds 7"),
    "78-no-slots": (at("layers", 0, "num_slots")(0), "'num_slots' is 0"),
    "78-experts-too-few": (at("variants", 1, "expert_map", 0)([4, 5]), "2 experts, config has 4"),
    "78-map-of-fewer-layers": (at("variants", 1, "expert_map")([]), "expert_map has 0 layers"),
    "78-map-a-number": (at("variants", 1, "expert_map")(5), "'expert_map' must be a list"),
    "79-file-not-listed": (at("files", "variants/b.safetensors")(...), "is not listed in 'files'"),
    "79-layer-not-listed": (at("files", LAYER)(...), "listed in 'files'"),
    "79-layers-too-few": (at("layers", 1)(...), "1 layers listed, config has 2"),
    "79-file-of-another-variant": (
        at(*EMBEDDING, "file")("variants/a.safetensors"),
        "does not belong to this variant",
    ),
    "79-tensor-missing": (at(*EMBEDDING, "tensor")("ghost"), "is missing or unknown"),
    "79-tensor-of-other-shape": (at(*EMBEDDING, "tensor")("final_norm"), "used for roles of unequ"),
    "79-role-missing": (at(*EMBEDDING)(...), "role 'embed_tokens' is missing or unknown"),
    "79-role-unknown": (
        at("variants", 1, "tensors", "extra")({"file": "x", "tensor": "x"}),
        "role 'extra' is missing or unknown",
    ),
    "79-reference-to-a-list": (at(*O_PROJ)([]), "o_proj: must be a JSON object"),
    "79-manifest-lists-itself": (another_file(MANIFEST), "manifest.json: "),
    "79-file-listed-but-absent": (another_file("more.txt"), "there is no such file"),
    "79-file-below-a-file": (another_file("README.md/x"), "there is no such file"),
    "79-no-variants": (at("variants")([]), "0 variants, outside 1.."),
    "79-config-of-other-shape": (at("config", "vocab_size")(4095), "the manifest implies [4095"),
    "79-config-without-experts": (at("config", "num_experts")(0), "'num_experts' is 0"),
    "79-config-of-many-layers": (at("config", "num_layers")(2**20), "config has 1048576"),
    "79-experts-of-no-dtype": (at("expert_dtype")("I8"), "expert_dtype 'I8' is not BF16"),
    "78-code-of-9-bits": (codes([[9, 1], [3, 2]]), "[9, 1] is not a private code [bits, step]"),
    "78-code-negative": (codes([[-1, 2], [3, 2]]), "private_codes[0][0]: field 'pair' holds -1"),
    "78-code-a-string": (codes([["3", 2], [3, 2]]), "private_codes[0][0]: field 'pair' holds '3'"),
    "78-code-of-three": (codes([[3, 2, 1], [3, 2]]), "[3, 2, 1] is not a private code"),
    "78-code-null": (codes([None, [3, 2]]), "'pair' must be a list, not null"),
    "78-codes-of-one-part": (codes([[3, 2]]), "must hold one [bits, step] for each of gate_up"),
    "78-codes-of-no-expert": (
        at("variants", 0, "private_codes", 0)([]),
        "private_codes[0]: must list 4 experts",
    ),
    "78-codes-of-one-layer": (at("variants", 0, "private_codes", 1)(...), "private_codes has 1 l"),
    "78-codes-missing": (at("variants", 0, "private_codes")(...), "private_codes has 0 layers"),
    "78-codes-in-a-plain-pack": (at("nested")(None), "private_codes has 2 layers"),
    "79-codes-of-fewer-bits": (codes([[0, 0], [3, 2]]), "is missing or unknown"),
    "79-codes-nobody-uses": (
        lambda m: [
            at("variants", 1, "private_codes", layer)([[[0, 0]] * 2] * 4)(m) for layer in (0, 1)
        ],
        "private codes that no variant uses",
    ),
    "79-codes-not-listed": (
        at("files", "private/b/layer-001.safetensors")(...),
        "private/b/layer-001.safetensors: missing, but the manifest needs it",
    ),
    "79-shared-bits-0": (at("nested", "down", "shared_bits")(0), "'shared_bits' is 0, outside"),
    "79-shared-bits-fewer": (at("nested", "down", "shared_bits")(2), "is missing or unknown"),
    "79-group-0": (at("nested", "gate_up", "group")(0), "nested: gate_up: field 'group' is 0"),
    "79-group-smaller": (at("nested", "gate_up", "group")(8), "scale: shape ["),
    "79-part-missing": (at("nested", "down")(...), "nested: field 'down' is missing"),
    "79-part-unknown": (at("nested", "extra")({}), "nested: unknown field 'extra'"),
    "79-recipe-a-list": (at("recipe")([]), "recipe: must be a JSON object"),
    "79-recipe-missing": (at("recipe")(...), "field 'recipe' is missing"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_manifests_that_lie(case: str, refused: Refused, bad_pack: Path) -> None:
    edit, complaint = FORGERIES[case]
    edit_json(bad_pack / MANIFEST, edit)
    for command in ("verify", "inspect"):
        refused(5, [str(bad_pack), complaint], command, bad_pack)
    refused(5, [str(bad_pack), complaint], "run", "--artifact", bad_pack, *ASK_B)


def rewrite(old: str, new: str) -> Callable[[str], bytes]:
    """Change the document's first line that matches."""
    return lambda text: re.sub(old, new, text, count=1).encode()


DOCUMENTS: dict[str, tuple[Callable[[str], bytes], str]] = {
    "76-duplicate-key": (rewrite(r"^\{", '{"format": "moec-pack",'), "duplicate key 'format'"),
    "76-duplicate-file": (
        rewrite(r'"files": \{', '"files": {"README.md": {},'),
        "duplicate key 'README.md'",
    ),
    "76-duplicate-digest": (rewrite(r'"bytes": \d+,', '"bytes": 1, "bytes": 2,'), "duplicate key"),
    "76-empty": (lambda _: b"", "not valid JSON"),
    "76-truncated": (lambda text: text[:-3].encode(), "not valid JSON"),
    "76-two-documents": (lambda text: (text + text).encode(), "not valid JSON: Extra data"),
    "76-list": (lambda text: f"[{text}]".encode(), "must be a JSON object, not a list"),
    "76-nul-padding": (lambda text: text.encode() + b"\0", "not valid JSON: Extra data"),
    "76-byte-order-mark": (lambda text: b"\xef\xbb\xbf" + text.encode(), "not valid JSON"),
    "76-not-utf8": (lambda text: text.encode().replace(b"moec-pack", b"\xff"), "not UTF-8"),
    "76-nan": (rewrite(r'"threshold": [\d.]+', '"threshold": NaN'), "NaN is not JSON"),
    "76-nested-100000-deep": (lambda _: b'{"recipe":' * 100_000, "nested too deep"),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_manifests_that_are_none(case: str, refused: Refused, bad_pack: Path) -> None:
    edit, complaint = DOCUMENTS[case]
    path = bad_pack / MANIFEST
    path.write_bytes(edit(path.read_text()))
    for command in ("verify", "inspect"):
        refused(5, [f"{path}: ", complaint], command, bad_pack)


def test_79_experts_of_other_dtype(refused: Refused, bad_plain_pack: Path) -> None:
    edit_json(bad_plain_pack / MANIFEST, at("expert_dtype")("F16"))
    words = [f"{bad_plain_pack / LAYER}: gate_up: dtype BF16 is not allowed here"]
    refused(5, words, "verify", bad_plain_pack)


def test_78_too_many_slots_cost_no_memory(bounded: Bounded, bad_plain_pack: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        num_experts = 2**16
        manifest["config"].update(num_experts=num_experts, num_layers=1)
        manifest["layers"] = [{"file": LAYER, "num_slots": 2**26}]
        for variant in manifest["variants"]:
            variant["expert_map"] = [[0] * num_experts]
            for role in [role for role in variant["tensors"] if role.startswith("layers.1.")]:
                del variant["tensors"][role]

    edit_json(bad_plain_pack / MANIFEST, edit)
    calls = [["inspect", bad_plain_pack], ["verify", bad_plain_pack, "--quiet"]]
    for call in calls:
        code, err = bounded(256 * 2**20, *call)
        assert code == 5
        assert "slot 1 of layer 0 is used by no variant" in one_line(err)


def test_79_a_tensor_file_nobody_refers_to(refused: Refused, bad_pack: Path) -> None:
    contents = (bad_pack / "variants" / "b.safetensors").read_bytes()
    forge(bad_pack, "variants/c.safetensors", contents)
    words = [f"{bad_pack / 'variants' / 'c.safetensors'}: tensor ", "is missing or unknown"]
    refused(5, words, "verify", bad_pack)


def test_a_context_no_machine_can_hold_is_no_problem(moec: Moec, bad_pack: Path) -> None:
    """What is computed for every position is computed when it is reached."""
    edit_json(bad_pack / MANIFEST, lambda manifest: manifest["config"].update(max_context=2**40))
    assert moec("run", "--artifact", bad_pack, *ASK_B)[0] == 0


def test_72_export_of_a_damaged_pack(refused: Refused, bad_pack: Path, tmp_path: Path) -> None:
    file = bad_pack / "variants" / "b" / "tokenizer.json"
    flip_bit(file, -1)
    out = tmp_path / "out"
    refused(5, [f"{file}: sha256"], "export", bad_pack, "--model", "b", "--out", out, "--quiet")

"""Checkpoint folders whose files do not belong together, or are not what they seem."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hostile.attacks import Edit, edit_json, entries
from hostile.conftest import Moec, Refused
from moeconsolidate.checkpoint import Checkpoint

pytestmark = pytest.mark.timeout(30)

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
NORM = "model.norm.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"

Spoil = Callable[[Path], object]


def index(edit: Edit) -> Spoil:
    return lambda folder: edit_json(folder / INDEX, edit)


def maps_to(shard: object) -> Spoil:
    return index(lambda document: document["weight_map"].update({NORM: shard}))


def write(file: str, contents: str) -> Spoil:
    return lambda folder: (folder / file).write_text(contents)


def replace(make: Callable[[Path], object]) -> Spoil:
    """Put something else in the place of a shard."""

    def spoil(folder: Path) -> None:
        (folder / SHARD).unlink()
        make(folder / SHARD)

    return spoil


def link_to(target: str) -> Spoil:
    return replace(lambda path: path.symlink_to(target))


def link_to_outside(folder: Path) -> None:
    (folder / SHARD).rename(folder.parent / "outside.safetensors")
    (folder / SHARD).symlink_to("../outside.safetensors")


def tensors(edit: Callable[[dict[str, Tensor]], object]) -> Spoil:
    """Change the second shard's tensors."""

    def spoil(folder: Path) -> None:
        loaded = load_file(folder / SHARD)
        edit(loaded)
        save_file(loaded, folder / SHARD)

    return spoil


def copy_between_shards(folder: Path) -> None:
    name, tensor = next(iter(load_file(folder / "model-00001-of-00003.safetensors").items()))
    tensors(lambda all_: all_.update({name: tensor}))(folder)


def only(*kept: str) -> Callable[[Path], None]:
    """Remove every weight but these files, which are put there."""

    def spoil(folder: Path) -> None:
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        for name in kept:
            (folder / name).write_bytes(b"\x80\x02}q\x00.")

    return spoil


CASES: dict[str, tuple[Spoil, list[str]]] = {
    "39-climbs": (maps_to("../b/model.safetensors"), [INDEX, "'../b/model.safetensors'"]),
    "39-absolute": (maps_to("/etc/passwd"), [INDEX, "'/etc/passwd'"]),
    "39-backslash": (maps_to(r"..\b.safetensors"), [INDEX, "is not the name of a file"]),
    "39-drive-letter": (maps_to("C:b.safetensors"), [INDEX, "'C:b.safetensors'"]),
    "39-hidden": (maps_to(".b.safetensors"), [INDEX, "'.b.safetensors'"]),
    "39-nul": (maps_to("b\0.safetensors"), [INDEX, r"'b\x00.safetensors'"]),
    "39-line-break": (maps_to("b\n.safetensors"), [INDEX, r"'b\n.safetensors'"]),
    "39-long": (maps_to("b" * 2**20 + ".safetensors"), [INDEX, "is not the name of a file"]),
    "39-no-tensor-file": (maps_to("config.json"), [INDEX, "'config.json'"]),
    "39-number": (maps_to(5), [INDEX, NORM, "must be a string"]),
    "39-surrogate": (maps_to("\ud800.safetensors"), [INDEX, NORM, "lone surrogate"]),
    "39-link-out": (link_to_outside, [SHARD, "outside the checkpoint folder"]),
    "39-link-to-a-device": (link_to("/dev/zero"), [SHARD, "outside the checkpoint folder"]),
    "39-link-to-itself": (link_to(SHARD), [SHARD, "leads nowhere"]),
    "39-link-to-nothing": (link_to("none"), [SHARD, "leads nowhere"]),
    "40-shard-missing": (lambda folder: (folder / SHARD).unlink(), [f"shard {SHARD} is missing"]),
    "40-shard-unheard-of": (
        index(lambda document: document["weight_map"].update(ghost="x.safetensors")),
        ["shard x.safetensors is missing"],
    ),
    "41-mapped-to-another-shard": (
        maps_to("x.safetensors"),
        [SHARD, f"'{NORM}' is here, but {INDEX} says it is in x.safetensors"],
    ),
    "41-mapped-tensor-absent": (
        tensors(lambda all_: all_.pop(next(iter(all_)))),
        [SHARD, "no tensor 'model.embed_tokens.weight'", INDEX],
    ),
    "41-mapped-tensor-unheard-of": (
        index(lambda document: document["weight_map"].update(ghost=SHARD)),
        [SHARD, "no tensor 'ghost'"],
    ),
    "42-tensor-not-indexed": (
        tensors(lambda all_: all_.update(ghost=torch.ones(2))),
        [SHARD, f"'ghost' is not in {INDEX}"],
    ),
    "43-tensor-in-two-shards": (copy_between_shards, [SHARD, "is here, but", "00001-of-00003"]),
    "43-two-models-in-a-folder": (
        lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors"),
        ["model.safetensors", INDEX, "two models in one folder"],
    ),
    "44-index-not-json": (write(INDEX, "<html>"), [INDEX, "not valid JSON"]),
    "44-index-empty": (write(INDEX, ""), [INDEX, "not valid JSON"]),
    "44-index-a-list": (write(INDEX, "[]"), [INDEX, "must be a JSON object, not a list"]),
    "44-index-without-weight-map": (write(INDEX, "{}"), [INDEX, "'weight_map' is missing"]),
    "44-weight-map-a-list": (
        write(INDEX, '{"weight_map": []}'),
        [INDEX, "weight_map: must be a JSON object"],
    ),
    "44-weight-map-empty": (write(INDEX, '{"weight_map": {}}'), [INDEX, "0 shards"]),
    "44-duplicate-key": (
        write(INDEX, '{"weight_map": {"a": "x", "a": "y"}}'),
        [INDEX, "duplicate key 'a'"],
    ),
    "45-only-a-pickle": (only("pytorch_model.bin"), ["pytorch_model.bin", "never opened"]),
    "45-only-pickled-shards": (
        only("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
        ["pytorch_model-00001-of-00002.bin", "never opened"],
    ),
    "45-only-consolidated": (only("consolidated.00.pth"), ["consolidated.00.pth", "never opened"]),
    "45-nothing": (only(), ["no weights"]),
    "46-fifo": (replace(os.mkfifo), [SHARD, "not a regular file"]),
    "46-folder": (replace(Path.mkdir), [SHARD, "not a regular file"]),
    "46-index-a-folder": (
        lambda folder: ((folder / INDEX).unlink(), (folder / INDEX).mkdir()),
        [INDEX, "not a regular file"],
    ),
    "46-config-a-fifo": (
        lambda folder: ((folder / "config.json").unlink(), os.mkfifo(folder / "config.json")),
        ["config.json", "not a regular file"],
    ),
    "48-adapter": (write("adapter_config.json", "{}"), ["adapter_config.json", "an adapter"]),
    "48-no-config": (
        lambda folder: (folder / "config.json").unlink(),
        ["no config.json: not a Hugging Face checkpoint folder"],
    ),
    "50-shards-differ-in-case": (
        lambda folder: (
            shutil.copy(folder / SHARD, folder / SHARD.upper().replace(".SAFE", ".safe")),
            edit_json(
                folder / INDEX,
                lambda document: document["weight_map"].update(ghost=SHARD.replace("m", "M")),
            ),
        ),
        [INDEX, "two shards have names that differ only in case"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_folders_that_do_not_hold_together(
    case: str, not_consolidated: Refused, models: Path
) -> None:
    spoil, words = CASES[case]
    spoil(models / "shards")
    not_consolidated([str(models / "shards"), *words], other="shards")


def fill(name: str, value: float, rows: slice = slice(None)) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        loaded = load_file(path)
        loaded[name][rows] = value
        save_file(loaded, path)

    return spoil


WEIGHTS: dict[str, tuple[Spoil, list[str]]] = {
    "47-expert-nan": (fill(EXPERT, float("nan"), slice(3, 4)), ["layer 1, expert 2: a weight is"]),
    "47-expert-infinity": (fill(EXPERT, float("inf")), ["layer 1, expert 2: a weight is not fin"]),
    "47-expert-minus-infinity": (fill(EXPERT, -float("inf")), ["layer 1, expert 2: a weight is"]),
    "47-embedding-nan": (
        fill("model.embed_tokens.weight", float("nan"), slice(4095, 4096)),
        ["tensor model.embed_tokens.weight: a weight is not finite"],
    ),
    "47-router-infinity": (
        fill("model.layers.1.block_sparse_moe.gate.weight", float("inf")),
        ["tensor model.layers.1.block_sparse_moe.gate.weight: a weight is not finite"],
    ),
    "47-head-minus-infinity": (
        fill("lm_head.weight", -float("inf"), slice(0, 1)),
        ["tensor lm_head.weight: a weight is not finite"],
    ),
}


@pytest.mark.parametrize("threshold", [0.9, 1.0])
@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_no_numbers(
    case: str, threshold: float, refused: Refused, models: Path, tmp_path: Path
) -> None:
    spoil, words = WEIGHTS[case]
    spoil(models / "b")
    folders = [models / "a", models / "b"]
    arguments = ["--threshold", threshold, "--out", tmp_path / "out", "--quiet"]
    refused(3, [str(models / "b"), *words], "consolidate", *folders, *arguments)


def test_47_zero_expert(refused: Refused, models: Path, tmp_path: Path) -> None:
    for matrix in ("w1", "w2", "w3"):
        fill(EXPERT.replace("w3", matrix), 0.0)(models / "b")
    words = [str(models / "b"), "layer 1, expert 2: all weights are zero"]
    folders = [models / "a", models / "b"]
    refused(3, words, "consolidate", *folders, "--out", tmp_path / "out", "--quiet")


def test_47_other_tensors_may_be_zero(moec: Moec, models: Path, tmp_path: Path) -> None:
    """A router of zeros chooses badly, but is a router."""
    fill("model.layers.1.block_sparse_moe.gate.weight", 0.0)(models / "b")
    folders = [models / "a", models / "b"]
    assert moec("consolidate", *folders, "--out", tmp_path / "out", "--quiet")[0] == 0


def test_45_a_pickle_beside_the_weights_is_not_opened(
    moec: Moec, models: Path, tmp_path: Path
) -> None:
    os.mkfifo(models / "b" / "pytorch_model.bin")  # opening it would hang
    folders = [models / "a", models / "b"]
    assert moec("consolidate", *folders, "--out", tmp_path / "out", "--quiet")[0] == 0


def replace_by_copy(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def rewrite(path: Path) -> None:
    """In place: a file that is empty for a moment has shrunk for whoever reads it then."""
    contents = path.read_bytes()
    with path.open("r+b") as file:
        file.write(contents)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "49-rewritten": (rewrite, "changed while"),
    "49-truncated": (lambda path: os.truncate(path, 5000), "shrank while"),
    "49-removed": (Path.unlink, "vanished while"),
    "49-replaced": (replace_by_copy, "changed while"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_files_that_change_meanwhile(
    case: str, moec: Moec, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, complaint = CHANGES[case]
    path = models / "b" / "model.safetensors"
    read, changed = Checkpoint.read_expert, False

    def change_once(self: Checkpoint, layer: int, expert: int, *, out: Tensor) -> str:
        nonlocal changed
        if layer == 1 and not changed:
            changed = True
            change(path)
        return read(self, layer, expert, out=out)

    monkeypatch.setattr(Checkpoint, "read_expert", change_once)
    folders = [models / "a", models / "b"]
    code, _, err = moec("consolidate", *folders, "--out", tmp_path / "out", "--quiet")
    assert (code, err.count("\n")) == (3, 1)
    assert err.startswith(f"moec: error: {path}: {complaint}")
    assert entries(tmp_path) == []


def test_50_tensors_that_differ_in_case(not_consolidated: Refused, models: Path) -> None:
    path = models / "b" / "model.safetensors"
    save_file(load_file(path) | {"Model.norm.weight": torch.ones(16)}, path)
    not_consolidated([str(path), "tensor 'Model.norm.weight' has no place"])


def test_50_variants_that_differ_in_case(refused: Refused, models: Path, tmp_path: Path) -> None:
    arguments = [f"x={models / 'a'}", f"X={models / 'b'}", "--out", tmp_path / "out"]
    refused(2, [str(models / "a"), str(models / "b"), "'X' (case is"], "consolidate", *arguments)


def test_59_the_folder_a_config_names_decides_nothing(
    moec: Moec, models: Path, tmp_path: Path
) -> None:
    """transformers writes where a model was loaded from, which need not be what it came from."""
    names = {"a": "org/base", "b": "/home/someone/base"}
    for name, origin in names.items():
        edit_json(models / name / "config.json", lambda c, o=origin: c.update(_name_or_path=o))
    folders = [models / "a", models / "b"]
    code, out, err = moec("consolidate", *folders, "--out", tmp_path / "out", "--quiet", "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(out)["variants"]) == 2

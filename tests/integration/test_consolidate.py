"""From checkpoints to a pack and back, on real files."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers import TINY_CONFIG, MakeCheckpoint, random_tensors, tree_digests
from moeconsolidate import consolidate, export_variant
from moeconsolidate.layers import LayerReader
from moeconsolidate.pipeline import Checkpoint, make_plan
from moeconsolidate.plan import Progress
from moeconsolidate.report import summarise
from moeruntime import Pack, verify_pack
from moeruntime.errors import (
    CheckpointError,
    IntegrityError,
    RequestError,
    ResourceError,
    UsageError,
)

Folders = dict[str, Path]


def same_bits(left: Tensor, right: Tensor) -> bool:
    same_kind = (left.dtype, left.shape) == (right.dtype, right.shape)
    return same_kind and torch.equal(left.view(torch.int16), right.view(torch.int16))


def load_folder(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def expert(tensors: dict[str, Tensor], layer: int, number: int) -> Tensor:
    start = f"model.layers.{layer}.block_sparse_moe.experts.{number}."
    return torch.cat([tensors[f"{start}{name}.weight"].flatten() for name in ("w1", "w3", "w2")])


# -- what a pack holds -----------------------------------------------------------------------------


def test_packs_hold_what_their_manifest_says(pack: Path, lossless_pack: Path) -> None:
    for root in (pack, lossless_pack):
        assert verify_pack(root).variant_names == ("base", "python", "math", "shell")
        assert not list(root.parent.glob(".*"))


def test_the_library_reads_every_tensor_file(merged_pack: Path, pack: Path) -> None:
    layer = load_file(merged_pack / "experts" / "layer-000.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in layer.items()} == {
        "gate_up": (8, 384, 96),
        "down": (8, 96, 192),
    }
    assert len(load_file(merged_pack / "variants" / "math.safetensors")) == 4 * 7 + 3
    coded = load_file(pack / "experts" / "layer-000.safetensors")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in coded.items()} == {
        "gate_up.4": (torch.uint8, (8, 384, 48)),
        "gate_up.scale": (torch.bfloat16, (8, 384, 3)),
        "down.4": (torch.uint8, (8, 96, 96)),
        "down.scale": (torch.bfloat16, (8, 96, 6)),
    }
    private = load_file(pack / "private" / "math" / "layer-003.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in private.items()} == {
        f"experts.{expert}.{part}.{width}": shape
        for expert in range(8)
        for part, width, shape in (
            ("gate_up", 2, (384, 24)),
            ("gate_up", 1, (384, 12)),
            ("down", 2, (96, 48)),
            ("down", 1, (96, 24)),
        )
    }


def test_slots_hold_the_average_of_their_members(merged_pack: Path, checkpoints: Folders) -> None:
    originals = {name: load_folder(folder) for name, folder in checkpoints.items()}
    with Pack(merged_pack) as opened:
        assert opened.manifest.num_slots == (8, 8, 8, 8)
        for layer in range(4):
            stored = load_file(merged_pack / "experts" / f"layer-{layer:03d}.safetensors")
            for slot, members in enumerate(opened.manifest.members(layer)):
                rows = [expert(originals[name], layer, number) for name, number in members]
                mean_P = torch.stack(rows).float().mean(dim=0)
                slot_P = torch.cat(
                    [stored["gate_up"][slot].flatten(), stored["down"][slot].flatten()]
                )
                torch.testing.assert_close(slot_P.float(), mean_P, rtol=2**-7, atol=1e-6)


def test_similar_experts_share_whatever_their_number(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """The second model's experts are the first's in another order, slightly changed."""
    order = (2, 0, 3, 1)
    first = random_tensors(TINY_CONFIG, seed=0)
    noise = random_tensors(TINY_CONFIG, seed=1)
    second = dict(first)
    for name in first:
        if ".experts." in name:
            number = int(name.split(".")[5])
            source = name.replace(f"experts.{number}.", f"experts.{order[number]}.")
            second[name] = (first[source].float() + 0.1 * noise[name].float()).bfloat16()
    models = [make_checkpoint("a", tensors=first), make_checkpoint("b", tensors=second)]
    result = consolidate(models, tmp_path / "pack", threshold=0.9)
    assert result.manifest.variants[0].expert_map == ((0, 1, 2, 3),) * 2
    assert result.manifest.variants[1].expert_map == (order,) * 2
    assert result.plan.layers[0].expert_map(1) == order


def test_common_tensors_are_stored_once(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Norms equal in all four, embeddings in pairs, the head nowhere."""

    def edit(seed: int) -> Callable[[dict[str, Tensor]], None]:
        def apply(tensors: dict[str, Tensor]) -> None:
            tensors["model.norm.weight"] = torch.ones(16).bfloat16()
            tensors["model.embed_tokens.weight"] = torch.full((4096, 16), seed // 2).bfloat16()

        return apply

    models = [make_checkpoint(f"m{seed}", seed=seed, edit=edit(seed)) for seed in range(4)]
    result = consolidate(models, tmp_path / "pack", threshold=1.0)
    common = load_file(tmp_path / "pack" / "variants" / "common.safetensors")
    assert common.keys() == {"final_norm", "embed_tokens", "embed_tokens@2"}
    assert result.manifest.shared_roles() == {"final_norm"}
    tables = [variant.tensors for variant in result.manifest.variants]
    names = [table["embed_tokens"].tensor for table in tables]
    assert names == ["embed_tokens", "embed_tokens", "embed_tokens@2", "embed_tokens@2"]
    assert {table["lm_head"].file for table in tables} == {
        f"variants/m{seed}.safetensors" for seed in range(4)
    }
    for seed, model in enumerate(models):
        folder = export_variant(tmp_path / "pack", f"m{seed}", tmp_path / f"out{seed}")
        assert tree_digests(folder).keys() == tree_digests(model).keys()
        exported, original = load_folder(folder), load_folder(model)
        assert all(same_bits(exported[name], original[name]) for name in original)


def test_models_that_differ_in_nothing_have_no_files_of_their_own(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    consolidate([make_checkpoint("a"), make_checkpoint("b")], tmp_path / "pack", threshold=1.0)
    verify_pack(tmp_path / "pack")
    assert not (tmp_path / "pack" / "variants" / "a.safetensors").exists()
    with Pack(tmp_path / "pack") as opened:
        summary = summarise(opened)
    assert summary.expert_ratio == summary.pack_ratio == 0.5


def test_summary_counts_against_separate_models(pack: Path, checkpoints: Folders) -> None:
    with Pack(pack) as opened:
        summary = summarise(opened)
    originals = [load_folder(folder).values() for folder in checkpoints.values()]
    assert summary.separate_bytes == sum(tensor.nbytes for all_ in originals for tensor in all_)
    assert summary.expert_ratio == (4 + 4 * 3 + 16 / 32) / (4 * 16)
    assert summary.pack_bytes == sum(
        tensor.nbytes for path in pack.rglob("*.safetensors") for tensor in load_file(path).values()
    )
    assert json.loads(json.dumps(summary.to_json()))["layers"][0]["shared"][0] == {
        "slot": 0,
        "members": [["base", 0], ["python", 0], ["math", 0], ["shell", 0]],
    }


def test_the_longest_name_works(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    name = "n" * 64
    models = {name: make_checkpoint("a"), "b": make_checkpoint("b", seed=1)}
    consolidate(models, tmp_path / "pack")
    assert verify_pack(tmp_path / "pack").variant_names == (name, "b")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_stay_as_they_are(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    def convert(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    models = [make_checkpoint(f"m{seed}", seed=seed, edit=convert) for seed in (0, 1)]
    consolidate(models, tmp_path / "pack", threshold=1.0)
    exported = load_folder(export_variant(tmp_path / "pack", "m1", tmp_path / "out"))
    original = load_folder(models[1])
    assert {tensor.dtype for tensor in exported.values()} == {dtype}
    assert all(torch.equal(exported[name], original[name]) for name in original)


# -- the same inputs, the same bytes ---------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.9, 1.0])
def test_the_bytes_depend_on_the_inputs_alone(
    checkpoints: Folders, pack: Path, lossless_pack: Path, tmp_path: Path, threshold: float
) -> None:
    """Another place for the inputs, another for the output, another number of threads."""
    moved = {name: tmp_path / "moved" / f"x-{name}" for name in checkpoints}
    for name, folder in checkpoints.items():
        shutil.copytree(folder, moved[name])
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 3)
    try:
        consolidate(moved, tmp_path / "other-name", threshold=threshold)
    finally:
        torch.set_num_threads(before)
    reference = pack if threshold == 0.9 else lossless_pack
    assert tree_digests(tmp_path / "other-name") == tree_digests(reference)


@pytest.mark.parametrize(("room", "times"), [(2**40, 1), (0, 2)])
def test_other_weights_are_read_again_only_where_there_is_no_room(
    checkpoints: Folders,
    pack: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    times: int,
) -> None:
    reads: Counter[tuple[str, str]] = Counter()
    read = Checkpoint.read_non_expert

    def counted(self: Checkpoint, role: str) -> Tensor:
        reads[self.name, role] += 1
        return read(self, role)

    monkeypatch.setattr(Checkpoint, "read_non_expert", counted)
    monkeypatch.setattr(LayerReader, "release", lambda self: room)
    consolidate(checkpoints, tmp_path / "other", threshold=0.9)
    assert set(reads.values()) <= {1, times} and times in reads.values()
    assert tree_digests(tmp_path / "other") == tree_digests(pack)


def test_the_form_of_the_inputs_does_not_matter(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    forms: list[dict[str, Any]] = [{}, {"fused": True}, {"num_shards": 3}]
    packs = []
    for number, form in enumerate(forms):
        parent = tmp_path / str(number)
        models = [make_checkpoint(f"m{seed}", seed=seed, parent=parent, **form) for seed in (0, 1)]
        packs.append(tree_digests(consolidate(models, tmp_path / f"pack{number}").pack))
    assert packs[0] == packs[1] == packs[2]


def test_nothing_of_the_machine_is_in_a_pack(pack: Path, checkpoints: Folders) -> None:
    traces = [str(pack.parent), str(checkpoints["base"].parent), "mini-base"]
    for path in pack.rglob("*"):
        if path.is_file():
            contents = path.read_bytes()
            assert not any(trace.encode() in contents for trace in traces), path


def test_one_layer_of_all_variants_is_all_there_is(
    checkpoints: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each expert is read once, into one buffer, while no more than one layer is being written."""
    reads: list[tuple[str, int, int]] = []
    buffers: set[int] = set()
    original = Checkpoint.read_expert

    def spy(self: Checkpoint, layer: int, expert: int, *, out: Tensor) -> str:
        reads.append((self.name, layer, expert))
        buffers.add(out.untyped_storage().data_ptr())
        assert out.untyped_storage().nbytes() == 4 * 8 * out.nbytes
        staging = tmp_path / ".pack.partial" / "pack"
        assert layer - 1 <= len(list((staging / "experts").iterdir())) <= layer
        return original(self, layer, expert, out=out)

    monkeypatch.setattr(Checkpoint, "read_expert", spy)
    consolidate(checkpoints, tmp_path / "pack")
    assert len(reads) == len(set(reads)) == 4 * 4 * 8
    assert len(buffers) == 1


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 1_000_000])
def test_a_lossless_pack_gives_back_what_went_in(
    lossless_pack: Path, checkpoints: Folders, tmp_path: Path, max_shard_bytes: int
) -> None:
    for name, folder in checkpoints.items():
        out = tmp_path / name
        export_variant(lossless_pack, name, out, max_shard_bytes=max_shard_bytes)
        original, exported = load_folder(folder), load_folder(out)
        assert exported.keys() == original.keys()
        assert all(same_bits(exported[key], original[key]) for key in original)
        small_files = {"config.json", "generation_config.json", "tokenizer.json"}
        for file in small_files | {"tokenizer_config.json"}:
            assert (out / file).read_bytes() == (folder / file).read_bytes()


def test_shards_are_indexed_and_bounded(lossless_pack: Path, tmp_path: Path) -> None:
    export_variant(lossless_pack, "math", tmp_path / "out", max_shard_bytes=1_000_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{number:05d}-of-00006.safetensors" for number in range(1, 7)
    ]
    total_bytes = 0
    for path in shards:
        tensors = load_file(path)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 1_000_000
        assert all(index["weight_map"][name] == path.name for name in tensors)
    assert index["metadata"] == {"total_parameters": total_bytes // 2, "total_size": total_bytes}


def test_an_export_can_be_consolidated_again(
    lossless_pack: Path, checkpoints: Folders, tmp_path: Path
) -> None:
    folders = {
        name: export_variant(lossless_pack, name, tmp_path / name, max_shard_bytes=2_000_000)
        for name in checkpoints
    }
    consolidate(folders, tmp_path / "pack", threshold=1.0)
    assert tree_digests(tmp_path / "pack") == tree_digests(lossless_pack)


@pytest.mark.slow
def test_transformers_loads_an_export(pack: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = export_variant(pack, "math", tmp_path / "math", max_shard_bytes=1_000_000)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = AutoTokenizer.from_pretrained(folder)("What is 3 + 4?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()


def test_a_damaged_lossless_pack_is_not_exported(lossless_pack: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pack"
    shutil.copytree(lossless_pack, copy)
    path = copy / "experts" / "layer-002.safetensors"
    contents = bytearray(path.read_bytes())
    contents[5000] ^= 1
    path.write_bytes(contents)
    with pytest.raises(IntegrityError, match="not the model that was consolidated"):
        export_variant(copy, "base", tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["pack"]


def test_exports_that_make_no_sense(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no variant 'maths'; it has: base, python, math, shell"):
        export_variant(pack, "maths", tmp_path / "out")
    with pytest.raises(UsageError, match="lies inside the input"):
        export_variant(pack, "math", pack / "out")
    with pytest.raises(UsageError, match="exists already"):
        export_variant(pack, "math", tmp_path)
    with pytest.raises(UsageError, match="must be at least 1"):
        export_variant(pack, "math", tmp_path / "out", max_shard_bytes=0)


# -- what goes wrong leaves nothing behind ---------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"num_local_experts": 3}, "num_local_experts is 4 and 3"),
        ({"intermediate_size": 32}, "intermediate_size is 24 and 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2 and 3"),
        ({"vocab_size": 4097}, "vocab_size is 4096 and 4097"),
        ({"rope_theta": 1e6}, r"rope_theta is 10000\.0 and 1000000\.0"),
        ({"sliding_window": 64}, "sliding_window is null and 64"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is false and true"),
    ],
)
def test_models_must_agree(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, config: dict[str, object], field: str
) -> None:
    models = [make_checkpoint("a"), make_checkpoint("b", config=config)]
    with pytest.raises(CheckpointError, match=rf"a and .*b cannot share a pack: .*{field}"):
        consolidate(models, tmp_path / "pack")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("threshold", [0.9, 1.0])
def test_a_bad_expert_is_named_and_nothing_is_left(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, threshold: float
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"][5, 7] = float("nan")

    models = [make_checkpoint("a"), make_checkpoint("b", edit=spoil)]
    with pytest.raises(CheckpointError, match=r"b: b, layer 1, expert 2: a weight is not finite"):
        consolidate(models, tmp_path / "pack", threshold=threshold)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_targets_that_make_no_sense(checkpoints: Folders, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, complaint in {
        ".": "exists already",
        "dangling": "exists already",
        "none/pack": "is not an existing folder",
    }.items():
        with pytest.raises(UsageError, match=complaint):
            consolidate(checkpoints, tmp_path / name)
    shutil.copytree(checkpoints["base"], tmp_path / "base")
    with pytest.raises(UsageError, match="lies inside the input"):
        consolidate([tmp_path / "base", checkpoints["math"]], tmp_path / "base" / "pack")


def test_a_target_that_appears_meanwhile_is_left_alone(
    checkpoints: Folders, tmp_path: Path
) -> None:
    def appear(step: Progress) -> None:
        (tmp_path / "pack").mkdir(exist_ok=True)
        (tmp_path / "pack" / "precious").touch()

    with pytest.raises(UsageError, match="appeared while it was being written"):
        consolidate(checkpoints, tmp_path / "pack", on_progress=appear)
    assert [path.name for path in tmp_path.rglob("*")] == ["pack", "precious"]


def test_interrupts_leave_nothing_even_when_repeated(
    lossless_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def interrupted_rmtree(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGINT)  # Ctrl-C again, while cleaning up
        remove(*args, **kwargs)

    def interrupt(step: Progress) -> None:
        if step.done == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(shutil, "rmtree", interrupted_rmtree)
    with pytest.raises(KeyboardInterrupt):
        export_variant(lossless_pack, "math", tmp_path / "math", on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_source_that_changes_is_noticed(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    models = [make_checkpoint("a"), make_checkpoint("b", seed=1)]

    def change(step: Progress) -> None:
        with (models[1] / "model.safetensors").open("r+b") as file:
            file.seek(-2, 2)
            file.write(b"\x00\x01")

    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while"):
        consolidate(models, tmp_path / "pack", on_progress=change)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_a_full_disk_is_noticed_in_advance(
    checkpoints: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ResourceError, match=r"0\.001 GB free on this disk, 0\.002 GB needed"):
        consolidate(checkpoints, tmp_path / "pack")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(
    checkpoints: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="pack: cannot be written: No space left on device"):
        consolidate(checkpoints, tmp_path / "pack")
    assert list(tmp_path.iterdir()) == []


def _scale_experts(tensors: dict[str, Tensor], by: float) -> None:
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensor.mul_(by)


def test_a_lossless_plan_of_other_models_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    first, same = make_checkpoint("a"), make_checkpoint("b")
    plan = make_plan({"a": first, "b": same}, threshold=1.0)
    other = make_checkpoint("c", edit=lambda tensors: _scale_experts(tensors, 2.0))
    with pytest.raises(UsageError, match="made of other models"):
        consolidate({"a": first, "b": other}, tmp_path / "pack", plan=plan)
    assert not (tmp_path / "pack").exists()


def test_nested_codes_too_share_identical_experts_only_at_threshold_one(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Twice an expert is as similar to it as can be."""
    models = [
        make_checkpoint("a"),
        make_checkpoint("b", edit=lambda tensors: _scale_experts(tensors, 2.0)),
    ]
    for threshold, size in ((1.0, 1), (0.9, 2)):
        plan = make_plan(models, threshold=threshold, code="nested")
        assert {len(slot) for layer in plan.layers for slot in layer.slots} == {size}


@pytest.mark.parametrize("merge", ["ties", "task-arithmetic", "average"])
def test_every_rule_keeps_every_bit_of_identical_experts(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, merge: str
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".experts." in name:
                tensor[0, :4] = torch.tensor([-0.0, 0.0, 3e38, -3e38])

    models = {name: make_checkpoint(name, edit=edit) for name in ("a", "b", "c")}
    pack = consolidate(models, tmp_path / "pack", threshold=1.0, merge=merge).pack
    export_variant(pack, "b", tmp_path / "again")  # which compares digests

"""The golden packs, byte for byte, and what a reader who only knows the format sees in them.

A failure here means that packs written by an earlier moec and by this one differ. If that is
wanted, raise the format's version and run make.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import make
import numpy as np
import pytest
import safetensors
import torch
from numpy.typing import NDArray

from moeruntime import Engine, Pack, Request, SamplingParams, verify_pack
from runtime_fixtures import assert_same_greedy, engine_logits, load_reference, reference_logits

FOLDER = Path(__file__).resolve().parent
CHECKPOINTS, PACK, NESTED = (FOLDER / name for name in ("checkpoints", "pack", "pack-nested"))
VARIANTS = ("plain", "chatty")
ROLES = ("gate_proj", "up_proj", "down_proj")
Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]

EXPECTED = {
    name: [json.loads(line) for line in (FOLDER / expected).read_text().splitlines()]
    for name, (_, expected) in make.PACKS.items()
}
BOTH = pytest.mark.parametrize("root", [PACK, NESTED], ids=lambda root: root.name)


# -- a reader, written from docs/format.md ---------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Any]:
    """A safetensors file: bf16 tensors widened to float32, and bytes as they are."""
    tensors: dict[str, Any] = {}
    for name, entry in safetensors.deserialize(path.read_bytes()):
        kind = {"BF16": "<u2", "U8": "u1"}[entry["dtype"]]
        values = np.frombuffer(entry["data"], dtype=kind).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            tensors[name] = (values.astype(np.uint32) << 16).view(np.float32)
        else:
            tensors[name] = values
    return tensors


def unpack(planes: dict[int, Bytes], num_columns: int) -> NDArray[np.int64]:
    """The codes [rows, columns] of a matrix: widths 4, 2, 1, each below the one before."""
    codes: Any = 0
    for width in sorted(planes, reverse=True):
        plane = planes[width].astype(np.int64)
        row_bytes = plane.shape[1]
        assert row_bytes == -(-num_columns * width // 8)
        fields = np.empty((len(plane), num_columns), dtype=np.int64)
        for column in range(num_columns):
            number, place = divmod(column, row_bytes)
            fields[:, column] = (plane[:, place] >> (number * width)) % 2**width
        codes = codes * 2**width + fields
    return np.asarray(codes)


class Reader:
    """Variants of a pack, by role."""

    def __init__(self, root: Path) -> None:
        self.manifest = json.loads((root / "manifest.json").read_bytes())
        assert self.manifest["format"] == "moec-pack"
        assert self.manifest["format_version"] == "0.3"
        self.variants = {variant["name"]: variant for variant in self.manifest["variants"]}
        self.files: dict[str, dict[str, Any]] = {}
        for path, file in self.manifest["files"].items():
            data = (root / path).read_bytes()
            assert len(data) == file["bytes"]
            assert hashlib.sha256(data).hexdigest() == file["sha256"]
            if path.endswith(".safetensors"):
                self.files[path] = read_tensors(root / path)

    def non_expert(self, variant: str, role: str) -> Array:
        place = self.variants[variant]["tensors"][role]
        tensor: Array = self.files[place["file"]][place["tensor"]]
        return tensor

    def slot(self, variant: str, layer: int, expert: int) -> int:
        slot: int = self.variants[variant]["expert_map"][layer][expert]
        return slot

    def expert(self, variant: str, layer: int, expert: int) -> dict[str, Array]:
        gate_up, down = (self.part(variant, layer, expert, idx) for idx in (0, 1))
        half = len(gate_up) // 2
        return dict(zip(ROLES, (gate_up[:half], gate_up[half:], down), strict=True))

    def part(self, variant: str, layer: int, expert: int, idx: int) -> Array:
        """gate_up or down of one variant's expert: as it is stored, or decoded."""
        name = ("gate_up", "down")[idx]
        tensors = self.files[self.manifest["layers"][layer]["file"]]
        slot = self.slot(variant, layer, expert)
        if self.manifest["nested"] is None:
            plain: Array = tensors[name][slot]
            return plain
        config, nested = self.manifest["config"], self.manifest["nested"][name]
        num_columns = config["intermediate_size" if name == "down" else "hidden_size"]
        h, group = nested["shared_bits"], nested["group"]
        r, a = self.variants[variant]["private_codes"][layer][expert][idx]
        shared = {w: tensors[f"{name}.{w}"][slot] for w in (4, 2, 1) if h & w}
        level = unpack(shared, num_columns) * 2 ** (7 - h)
        if r:
            private = self.files[f"private/{variant}/layer-{layer:03d}.safetensors"]
            planes = {w: private[f"experts.{expert}.{name}.{w}"] for w in (4, 2, 1) if r & w}
            level = level + a * unpack(planes, num_columns)
        middle = ((2**h - 1) * 2 ** (7 - h) + a * (2**r - 1)) / 2
        scale = np.repeat(tensors[f"{name}.scale"][slot], group, axis=1)[:, :num_columns]
        weights = scale.astype(np.float64) * (level - middle)
        assert np.array_equal(weights, weights.astype(np.float32)), "float32 holds them exactly"
        return weights.astype(np.float32)


# -- the checkpoints, by their Hugging Face names --------------------------------------------------

ROLE_NAMES = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **{f"{letter}_proj": f"self_attn.{letter}_proj" for letter in "qkvo"},
}


class Source:
    """One of the two checkpoints: `plain` has a tensor an expert, `chatty` fused ones."""

    def __init__(self, name: str) -> None:
        self.tensors = read_tensors(CHECKPOINTS / name / "model.safetensors")
        self._fused = name == "chatty"
        self._moe = "mlp" if self._fused else "block_sparse_moe"

    def non_expert(self, role: str) -> Array:
        if not role.startswith("layers."):
            place = {"embed_tokens": "embed_tokens", "final_norm": "norm"}[role]
            return self.tensors[f"model.{place}.weight"]
        _, layer, name = role.split(".")
        place = f"{self._moe}.gate" if name == "router" else ROLE_NAMES[name]
        return self.tensors[f"model.layers.{layer}.{place}.weight"]

    def expert(self, layer: int, expert: int) -> dict[str, Array]:
        start = f"model.layers.{layer}.{self._moe}.experts."
        if not self._fused:
            names = zip(ROLES, ("w1", "w3", "w2"), strict=True)
            return {role: self.tensors[f"{start}{expert}.{name}.weight"] for role, name in names}
        gate_up = self.tensors[start + "gate_up_proj"][expert]
        half = len(gate_up) // 2
        halves = (gate_up[:half], gate_up[half:], self.tensors[start + "down_proj"][expert])
        return dict(zip(ROLES, halves, strict=True))


def to_bf16(values: NDArray[np.float64]) -> Array:
    return torch.from_numpy(values).bfloat16().float().numpy()


# -- the tests -------------------------------------------------------------------------------------


def tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_the_checkpoints_are_what_make_makes(tmp_path: Path) -> None:
    make.make_checkpoints(tmp_path)
    assert tree(tmp_path) == tree(CHECKPOINTS)


@BOTH
def test_compiling_gives_the_same_bytes(tmp_path: Path, root: Path) -> None:
    code = make.PACKS[root.name][0]
    made, golden = tree(make.compile_pack(CHECKPOINTS, tmp_path / "pack", code)), tree(root)
    assert sorted(made) == sorted(golden)
    different = [path for path in golden if made[path] != golden[path]]
    assert not different


@BOTH
def test_the_golden_packs_are_sound(root: Path) -> None:
    assert verify_pack(root).variant_names == VARIANTS


@BOTH
def test_something_is_shared_and_something_is_not(root: Path) -> None:
    reader = Reader(root)
    assert [layer["num_slots"] for layer in reader.manifest["layers"]] == [5, 7]
    assert "variants/common.safetensors" in reader.files
    assert reader.slot("plain", 1, 3) == reader.slot("chatty", 1, 0)


@BOTH
def test_the_independent_reader_and_ours_agree_on_every_tensor(root: Path) -> None:
    reader = Reader(root)
    with Pack(root) as ours:
        config = ours.manifest.config
        assert ours.manifest.config.to_json() == reader.manifest["config"]
        used = set()
        for name in VARIANTS:
            assert set(reader.variants[name]["tensors"]) == set(config.non_expert_shapes())
            for role in config.non_expert_shapes():
                stored = ours.read_non_expert(name, role)
                assert np.array_equal(stored.float().numpy(), reader.non_expert(name, role))
            for layer in range(config.num_layers):
                for expert in range(config.num_experts):
                    slot = reader.slot(name, layer, expert)
                    used.add((layer, slot))
                    assert ours.variant(name).expert_map[layer][expert] == slot
                    for idx, part in enumerate(("gate_up", "down")):
                        stored = ours.read_expert(name, layer, expert, part)
                        decoded = reader.part(name, layer, expert, idx).astype(np.float64)
                        assert np.array_equal(stored.float().numpy(), to_bf16(decoded))
        assert len(used) == sum(ours.manifest.num_slots)


def test_the_engine_multiplies_by_what_the_independent_reader_decodes() -> None:
    """In float32, before any rounding to bf16."""
    reader = Reader(NESTED)
    with Engine.from_pack(NESTED, device="cpu", dtype="float32") as engine:
        names = engine.source.manifest.variant_names
        for layer, pool in enumerate(engine.model.experts):
            for name in VARIANTS:
                faces = engine.model.faces_VLE[names.index(name), layer].tolist()
                for expert, face in enumerate(faces):
                    for idx, weights in enumerate(pool.weights(face)):
                        decoded = reader.part(name, layer, expert, idx)
                        assert np.array_equal(weights.numpy(), decoded)


def test_nested_codes_are_close_to_the_checkpoints() -> None:
    """Of each variant its own: two that share a slot do not become one."""
    reader = Reader(NESTED)
    for name in VARIANTS:
        source = Source(name)
        for layer in range(2):
            for expert in range(4):
                decoded = reader.expert(name, layer, expert)
                for role, original in source.expert(layer, expert).items():
                    error = np.abs(decoded[role] - original).max() / np.abs(original).max()
                    assert error < 0.04, (name, layer, expert, role)


@BOTH
@pytest.mark.parametrize("name", VARIANTS)
def test_non_expert_tensors_are_the_checkpoints_own(name: str, root: Path) -> None:
    reader, source = Reader(root), Source(name)
    for role in reader.variants[name]["tensors"]:
        assert np.array_equal(reader.non_expert(name, role), source.non_expert(role)), role


def test_a_slot_is_the_mean_of_the_experts_it_serves() -> None:
    reader = Reader(PACK)
    sources = {name: Source(name) for name in VARIANTS}
    members: dict[tuple[int, int], list[dict[str, Array]]] = {}
    for name in VARIANTS:
        for layer in range(2):
            for expert in range(4):
                slot = reader.slot(name, layer, expert)
                members.setdefault((layer, slot), []).append(sources[name].expert(layer, expert))
    num_shared = 0
    for name in VARIANTS:
        for layer in range(2):
            for expert in range(4):
                experts = members[layer, reader.slot(name, layer, expert)]
                num_shared += len(experts) > 1
                stored = reader.expert(name, layer, expert)
                for role in ROLES:
                    mean = np.mean([one[role].astype(np.float64) for one in experts], axis=0)
                    assert np.array_equal(stored[role], to_bf16(mean)), (name, layer, expert, role)
    assert num_shared == 8, "four slots serve two experts each"


@BOTH
def test_the_recorded_choices_are_clear(root: Path) -> None:
    """No tie that another processor could break differently."""
    with Engine.from_pack(root, device="cpu", dtype="float32") as engine:
        for case in EXPECTED[root.name]:
            ids = case["prompt_ids"] + case["token_ids"][:-1]
            logits_TV = engine_logits(engine, case["model"], ids, [len(ids)])
            chosen_NV = logits_TV[len(case["prompt_ids"]) - 1 :]
            top_N2 = chosen_NV.topk(2).values
            assert float((top_N2[:, 0] - top_N2[:, 1]).min()) > 1e-4
            assert chosen_NV.argmax(-1).tolist() == case["token_ids"]


@BOTH
@pytest.mark.parametrize("resident", [1, 2])
def test_the_engine_says_what_was_recorded(resident: int, root: Path) -> None:
    expected = EXPECTED[root.name]
    with Engine.from_pack(root, device="cpu", dtype="float32", resident=resident) as engine:
        requests = [
            Request(case["model"], case["prompt"], SamplingParams(max_tokens=24), case["chat"])
            for case in expected
        ]
        assert [engine.tokenize(request) for request in requests] == [
            case["prompt_ids"] for case in expected
        ]
        outputs = engine.generate(requests)
    said: list[dict[str, Any]] = [
        {"token_ids": list(output.token_ids), "finish_reason": output.finish_reason}
        for output in outputs
    ]
    assert said == [{key: case[key] for key in said[0]} for case in expected]
    assert {case["finish_reason"] for case in expected} == {"stop", "length"}


def test_transformers_says_the_same_of_a_checkpoint_nothing_was_merged_into(
    tmp_path: Path,
) -> None:
    """At 1.0 the engine and transformers must agree on these, too, window and all."""
    from moeconsolidate import consolidate

    folders = {name: CHECKPOINTS / name for name in VARIANTS}
    packed = consolidate(folders, tmp_path / "pack", threshold=1.0).pack
    model = load_reference(folders["plain"])
    prompt = EXPECTED["pack"][0]["prompt_ids"]
    with Engine.from_pack(packed, device="cpu", dtype="float32") as engine:
        (output,) = engine.generate([Request("plain", prompt, SamplingParams(max_tokens=24))])
    expected = list(prompt)
    for _ in output.token_ids:
        expected.append(int(reference_logits(model, expected)[-1].argmax()))
    assert_same_greedy(
        output.token_ids,
        expected[len(prompt) :],
        lambda ids: reference_logits(model, ids)[-1],
        prompt,
    )

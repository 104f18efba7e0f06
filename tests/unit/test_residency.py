from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moeconsolidate import consolidate
from moeruntime.layout import ALIGNMENT, EMBEDDING, private_stages
from moeruntime.loader import Loader
from moeruntime.models import parameter_roles
from moeruntime.pack import Pack
from moeruntime.residency import Residency, SlotTable
from runtime_fixtures import checkpoints_with_common_tensors

NAMES = ("a", "b", "c")
CPU = torch.device("cpu")


# -- the table ---------------------------------------------------------------------------------


def test_slots_fill_before_anyone_is_evicted() -> None:
    table = SlotTable(3)
    assert [table.hold(name) for name in "abc"] == [(0, True), (1, True), (2, True)]
    assert table.hold("a") == (0, False)
    assert table.num_held == 3


def test_the_least_recently_used_idle_variant_goes_first() -> None:
    table = SlotTable(3)
    for name in "abc":
        table.hold(name)
        table.release(name)
    table.hold("a")
    table.release("a")
    assert table.hold("d") == (1, True), "b was used least recently"
    assert table.slot("b") is None
    assert (table.slot("a"), table.slot("c")) == (0, 2)


def test_held_variants_stay() -> None:
    table = SlotTable(2)
    table.hold("a")
    table.hold("b")
    assert table.hold("c") is None
    assert table.slot("c") is None
    table.release("b")
    assert table.hold("c") == (1, True)
    assert table.slot("a") == 0


def test_a_variant_held_twice_must_be_released_twice() -> None:
    table = SlotTable(1)
    table.hold("a")
    table.hold("a")
    table.release("a")
    assert table.hold("b") is None
    assert table.num_held == 1
    table.release("a")
    assert table.num_held == 0
    assert table.hold("b") == (0, True)


@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_the_table_agrees_with_a_list_in_order_of_use(num_slots: int) -> None:
    rng = random.Random(num_slots)
    table = SlotTable(num_slots)
    by_use: list[str] = []  # resident, least recently used first
    holds: dict[str, int] = dict.fromkeys("abcdef", 0)
    for _ in range(3000):
        held = [name for name, count in holds.items() if count]
        if held and rng.random() < 0.45:
            name = rng.choice(held)
            table.release(name)
            holds[name] -= 1
            continue
        name = rng.choice("abcdef")
        idle = [one for one in by_use if not holds[one]]
        got = table.hold(name)
        if name not in by_use and len(by_use) == num_slots and not idle:
            assert got is None
            continue
        assert got is not None
        assert got[1] == (name not in by_use)
        if name in by_use:
            by_use.remove(name)
        elif len(by_use) == num_slots:
            by_use.remove(idle[0])
        by_use.append(name)
        holds[name] += 1
        assert {table.slot(one) for one in by_use} <= set(range(num_slots))
        assert len({table.slot(one) for one in by_use}) == len(by_use)
        assert all(table.slot(one) is None for one in set("abcdef") - set(by_use))


# -- the weights -------------------------------------------------------------------------------


@pytest.fixture
def folders(make_checkpoint: Callable[..., Path]) -> dict[str, Path]:
    return checkpoints_with_common_tensors(make_checkpoint, NAMES)


@pytest.fixture
def source(folders: dict[str, Path], tmp_path: Path) -> Iterator[Pack]:
    with Pack(consolidate(folders, tmp_path / "pack", threshold=1.0).pack) as pack:
        yield pack


def expected(folder: Path, roles: tuple[str, ...]) -> Tensor:
    """The parameter as the checkpoint has it, read with the safetensors library."""
    tensors = load_file(folder / "model.safetensors")
    names = {
        "embed_tokens": "model.embed_tokens.weight",
        "final_norm": "model.norm.weight",
        "lm_head": "lm_head.weight",
        "input_norm": "input_layernorm.weight",
        "post_attention_norm": "post_attention_layernorm.weight",
        "router": "block_sparse_moe.gate.weight",
    } | {f"{letter}_proj": f"self_attn.{letter}_proj.weight" for letter in "qkvo"}
    parts = []
    for role in roles:
        if role.startswith("layers."):
            _, layer, name = role.split(".")
            parts.append(tensors[f"model.layers.{layer}.{names[name]}"])
        else:
            parts.append(tensors[names[role]])
    return torch.cat(parts)


def assert_resident(residency: Residency, source: Pack, variant: str, folder: Path) -> None:
    slot = residency.slot(variant)
    for parameter, roles in parameter_roles(source.manifest.config).items():
        stored = expected(folder, roles).to(residency.weights[parameter].dtype)
        assert torch.equal(residency.weights[parameter][slot], stored), (variant, parameter)


@pytest.mark.parametrize("kept_layers", [0, 1, 2])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_holds_its_variant_after_every_activation(
    source: Pack, folders: dict[str, Path], num_slots: int, dtype: torch.dtype, kept_layers: int
) -> None:
    residency = Residency(source, num_slots, dtype, Loader(CPU), kept_layers=kept_layers)
    held: list[str] = []
    resident: list[str] = []
    num_activations = 0
    for variant in [*"abcabcbbaaccab", "c", "b", "a"]:
        assert residency.admit(variant)
        for layer in (EMBEDDING, 0, 1, 2, None):
            residency.wait_for(variant, layer)
        assert residency.ready(variant)
        held.append(variant)
        if num_slots < len(NAMES):
            num_activations += variant not in resident
            resident = [*(one for one in resident if one != variant), variant][-num_slots:]
        assert residency.num_activations == num_activations
        for one in set(held):
            assert_resident(residency, source, one, folders[one])
        while len(set(held)) >= num_slots and held:
            residency.release(held.pop(0))
    assert residency.num_held == len(set(held))


def test_with_every_slot_held_nobody_else_is_admitted(
    source: Pack, folders: dict[str, Path]
) -> None:
    residency = Residency(source, 1, torch.float32, Loader(CPU))
    assert residency.admit("a")
    assert not residency.admit("b")
    assert residency.num_activations == 1
    assert_resident(residency, source, "a", folders["a"])
    residency.release("a")
    assert residency.admit("b")
    assert_resident(residency, source, "b", folders["b"])


def test_what_all_variants_share_is_stored_once(source: Pack) -> None:
    residency = Residency(source, 2, torch.float32, Loader(CPU))
    shared = {name for name, tensor in residency.weights.items() if tensor.stride(0) == 0}
    assert shared == {"layers.0.o_proj", "embed_tokens"}
    for name, tensor in residency.weights.items():
        assert tensor.shape[0] == 2
        if name in shared:
            assert tensor.untyped_storage().nbytes() == tensor[0].nbytes, name
        else:
            assert tensor[0].is_contiguous()
            assert tensor.storage_offset() % ALIGNMENT == 0
            assert tensor.stride(0) % ALIGNMENT == 0


def test_a_stage_is_one_run_of_memory_in_the_order_of_a_step(source: Pack) -> None:
    config, shared = source.manifest.config, source.manifest.shared_roles()
    embedding, *layers, head = private_stages(config, shared)
    assert not embedding.places, "all variants share it"
    assert list(head.places) == ["final_norm", "lm_head"]
    for idx, stage in enumerate(layers):
        assert all(name.startswith(f"layers.{idx}.") for name in stage.places)
        end = 0
        for place in stage.places.values():
            assert end <= place.start < end + ALIGNMENT
            end = place.start + place.numel
        assert end <= stage.numel < end + ALIGNMENT
    apart = private_stages(config, frozenset())
    assert list(apart[0].places) == ["embed_tokens"]
    assert "layers.0.o_proj" in apart[1].places
    assert "layers.0.o_proj" not in layers[0].places


@pytest.mark.parametrize(("kept_layers", "num_kept"), [(0, 0), (1, 2), (2, 3)])
def test_kept_layers_need_no_host_copy(source: Pack, kept_layers: int, num_kept: int) -> None:
    residency = Residency(source, 1, torch.float32, Loader(CPU), kept_layers=kept_layers)
    stages = private_stages(source.manifest.config, source.manifest.shared_roles())
    from_host = sum(stage.numel for stage in stages[num_kept:]) * 4
    assert residency.activation_bytes == from_host
    assert {memory.data.nbytes for memory in residency._host.values()} == {from_host}


def test_progress_names_every_variant_once(source: Pack) -> None:
    for num_slots in (1, 3):
        seen: list[str] = []
        Residency(source, num_slots, torch.float32, Loader(CPU), on_variant=seen.append)
        assert seen == list(NAMES)


def test_addresses_never_change(source: Pack) -> None:
    residency = Residency(source, 2, torch.float32, Loader(CPU))
    before = {name: tensor.data_ptr() for name, tensor in residency.weights.items()}
    for variant in "abcabc":
        residency.admit(variant)
        residency.release(variant)
    assert residency.num_activations == 6, "each one evicts the next: least recently used"
    assert {name: tensor.data_ptr() for name, tensor in residency.weights.items()} == before

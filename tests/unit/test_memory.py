from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moeruntime import Engine, memory
from moeruntime.errors import ResourceError, UsageError
from moeruntime.kv_cache import KVCache
from moeruntime.loader import RING_BYTES
from moeruntime.memory import RESERVE_BYTES, MemoryPlan, plan_memory
from moeruntime.models.layers import half_rotary_tables
from moeruntime.models.step_buffers import StepBuffers
from moeruntime.pack import Pack
from moeruntime.synthetic import SyntheticSource
from runtime_fixtures import pack_with_common_tensors

NUM_VARIANTS = 3


@pytest.fixture
def root(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return pack_with_common_tensors(make_checkpoint, tmp_path / "pack")


@pytest.fixture
def source(root: Path) -> Iterator[Pack]:
    with Pack(root) as pack:
        yield pack


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend that so many bytes are free."""

    def pretend(num_bytes: int) -> None:
        monkeypatch.setattr(memory, "available_bytes", lambda device: num_bytes)

    return pretend


def plan(source: Pack, **changes: Any) -> MemoryPlan:
    options: dict[str, Any] = {
        "num_slots": NUM_VARIANTS,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "max_sequences": 4,
        "max_step_tokens": 4,
        "cache_bytes": None,
        "kept_layers": 0,
    }
    return plan_memory(source, **(options | changes))


def needed_bytes(source: Pack, **changes: Any) -> int:
    """The least free memory with which these options fit, from the plan's own parts."""
    device = changes.get("device", torch.device("cpu")).type
    small = plan(source, cache_bytes=1, **changes)
    needed = small.weights_bytes + small.cache_bytes + small.buffer_bytes + RESERVE_BYTES[device]
    return needed + (small.host_bytes if device == "cpu" else 0)


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("resident", [1, 2, 3])
@pytest.mark.parametrize("kept", [0, 2])
def test_what_is_predicted_is_what_is_allocated(
    root: Path, resident: int, kept: int, dtype: str
) -> None:
    with Engine.from_pack(
        root, resident=resident, dtype=dtype, device="cpu", max_sequences=4, kept_layers=kept
    ) as engine:
        predicted = engine.memory
        pools = [t for layer in engine.model.experts for t in (layer.gate_up, layer.down)]
        weights = list(engine.residency.weights.values())
        cache = [*engine.model.cache.keys, *engine.model.cache.values]
        copies = [t for copies in engine.residency._copies.values() for t in copies]
        host = [memory.data for memory in engine.residency._host.values()]
        assert storage_bytes(pools) == predicted.experts_bytes
        assert storage_bytes(weights) == predicted.shared_bytes + predicted.resident_bytes
        assert storage_bytes(cache) == predicted.cache_bytes
        assert storage_bytes(host) == predicted.host_bytes
        assert storage_bytes([*copies, *host]) == predicted.host_bytes + predicted.kept_bytes
        assert (predicted.kept_bytes > 0) == (kept > 0 and resident < NUM_VARIANTS)
        assert predicted.shared_bytes > 0
        assert (predicted.host_bytes == 0) == (resident == NUM_VARIANTS)
        assert cache[0].shape[0] == predicted.num_blocks == engine.num_free_blocks
        block_bytes = KVCache.block_bytes(engine.source.manifest.config, engine.dtype)
        assert predicted.cache_bytes == predicted.num_blocks * block_bytes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_the_limit_is_exact(
    source: Pack, free: Callable[[int], None], num_slots: int, device: str
) -> None:
    free(2**40)
    options = {"num_slots": num_slots, "device": torch.device(device)}
    needed = needed_bytes(source, **options)
    free(needed)
    assert plan(source, **options).num_blocks == 1
    free(needed - 1)
    with pytest.raises(ResourceError, match=r"needs .* GB on .* GB are free"):
        plan(source, **options)


@pytest.mark.parametrize("kept", [1, 2])
def test_the_hint_names_the_most_variants_that_fit_a_gpu(
    source: Pack, free: Callable[[int], None], kept: int
) -> None:
    cuda = torch.device("cuda")
    free(2**40)
    enough = needed_bytes(source, num_slots=kept, device=cuda)
    for spare in (0, 100):
        free(enough + spare)
        with pytest.raises(ResourceError, match=f"--resident {kept} would fit"):
            plan(source, device=cuda)
        assert plan(source, num_slots=kept, device=cuda)
        with pytest.raises(ResourceError):
            plan(source, num_slots=kept + 1, device=cuda)
    free(enough - 1)
    with pytest.raises(ResourceError) as caught:
        plan(source, device=cuda)
    assert f"--resident {kept} " not in str(caught.value)


def test_a_cpu_is_not_told_to_evict_what_would_then_live_in_the_same_memory(
    source: Pack, free: Callable[[int], None]
) -> None:
    free(2**40)
    short = needed_bytes(source) - 1
    free(short)
    for num_slots in (1, 2):
        with pytest.raises(ResourceError):
            plan(source, num_slots=num_slots)
    with pytest.raises(ResourceError) as caught:
        plan(source)
    assert "--resident" not in str(caught.value)
    assert "--dtype bfloat16 would halve it" in str(caught.value)
    plan(source, dtype=torch.bfloat16)


def test_a_cpu_that_has_host_copies_anyway_may_hold_fewer_variants(
    source: Pack, free: Callable[[int], None]
) -> None:
    free(2**40)
    free(needed_bytes(source, num_slots=1))
    with pytest.raises(ResourceError, match="--resident 1 would fit"):
        plan(source, num_slots=2)
    plan(source, num_slots=1)


def test_keeping_first_layers_is_what_to_give_up_when_that_is_what_is_missing(
    source: Pack, free: Callable[[int], None]
) -> None:
    cuda = torch.device("cuda")
    free(2**40)
    enough = needed_bytes(source, num_slots=2, device=cuda)
    free(enough)
    with pytest.raises(ResourceError, match="keeping fewer first layers would fit"):
        plan(source, num_slots=2, device=cuda, kept_layers=2)
    plan(source, num_slots=2, device=cuda)


def test_a_gpu_keeps_a_layer_where_that_is_cheap(source: Pack, free: Callable[[int], None]) -> None:
    cuda = torch.device("cuda")
    free(2**40)
    nothing = plan(source, num_slots=1, device=cuda)
    one = plan(source, num_slots=1, device=cuda, kept_layers=1)
    assert nothing.kept_bytes == 0 < one.kept_bytes
    assert nothing.host_bytes - one.host_bytes == one.kept_bytes
    assert plan(source, num_slots=1, device=cuda, kept_layers=None) == one
    taken = nothing.weights_bytes + nothing.buffer_bytes + RESERVE_BYTES["cuda"]
    for left, expected in ((20 * one.kept_bytes, 1), (20 * one.kept_bytes - 1, 0)):
        free(taken + left)
        found = plan(source, num_slots=1, device=cuda, kept_layers=None, cache_bytes=1)
        assert found.kept_layers == expected
    free(2**40)
    assert plan(source, num_slots=1, kept_layers=None).kept_layers == 0, "a CPU gains nothing"
    assert plan(source, device=cuda, kept_layers=None).kept_layers == 0, "all are resident"
    assert plan(source, device=cuda, kept_layers=2).kept_bytes == 0


def test_a_gpu_needs_buffers_for_its_steps_and_no_decoded_experts(
    free: Callable[[int], None],
) -> None:
    free(2**40)
    coded = SyntheticSource("mixtral-tiny", num_variants=2, code="4+2")
    plain = SyntheticSource("mixtral-tiny", num_variants=2)
    options: dict[str, Any] = {"num_slots": 2, "dtype": torch.bfloat16, "max_sequences": 5}
    for source in (coded, plain):
        on_cpu, on_cuda = (
            plan_memory(
                source,
                device=torch.device(device),
                cache_bytes=2**20,
                kept_layers=0,
                max_step_tokens=9,
                **options,
            )
            for device in ("cpu", "cuda")
        )
        assert on_cpu.buffer_bytes == 0 < on_cuda.buffer_bytes
        assert on_cuda.decoded_bytes == 0
        assert (on_cpu.decoded_bytes > 0) == (source is coded)
        assert on_cuda.experts_bytes == on_cpu.experts_bytes
    # What is counted on "meta" is what is allocated; faces are 8, steps are filled up to 16.
    config = plain.manifest.config
    parts = (config, 9, 8, torch.bfloat16, frozenset({torch.bfloat16}))
    buffers = StepBuffers(*parts, torch.device("cpu"))
    values = [*vars(buffers).values(), *vars(buffers.lists).values()]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    tensors += [*buffers.routed.values(), *buffers.inner.values()]
    tensors += buffers.span_scratch.tensors()
    assert buffers.inputs.shape == (6, 16)
    assert storage_bytes(tensors) == buffers.num_bytes
    rotary = half_rotary_tables(config, torch.device("cpu"))
    assert on_cuda.buffer_bytes == buffers.num_bytes + sum(table.nbytes for table in rotary)


def test_host_copies_must_fit_the_host(source: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    free_bytes = {"cpu": 2**40, "cuda": 2**40}
    monkeypatch.setattr(memory, "available_bytes", lambda device: free_bytes[device.type])
    needed = plan(source, num_slots=1, device=cuda).host_bytes + RING_BYTES + RESERVE_BYTES["cpu"]
    free_bytes["cpu"] = needed
    plan(source, num_slots=1, device=cuda)
    for short, fit in ((needed - 1, 2), (0, 0)):
        free_bytes["cpu"] = short
        with pytest.raises(ResourceError, match=rf"copies of 3 variants.* of {fit} would fit"):
            plan(source, num_slots=1, device=cuda)
    plan(source, num_slots=NUM_VARIANTS, device=cuda)


def test_when_nothing_helps_the_hint_says_so(source: Pack, free: Callable[[int], None]) -> None:
    free(1000)
    with pytest.raises(ResourceError, match="a smaller cache, a larger device or a pack with"):
        plan(source, num_slots=1, dtype=torch.bfloat16)


def test_an_engine_that_does_not_fit_loads_nothing(root: Path, free: Callable[[int], None]) -> None:
    free(1000)
    loaded: list[str] = []
    with pytest.raises(ResourceError, match=re.escape(str(root))):
        Engine.from_pack(root, device="cpu", on_progress=loaded.append)
    assert loaded == []


def test_the_cache_holds_every_sequence_at_full_context_if_it_can(
    source: Pack, free: Callable[[int], None]
) -> None:
    blocks_each = source.manifest.config.max_context // 16
    free(2**40)
    assert plan(source, max_sequences=4).num_blocks == 4 * blocks_each
    block_bytes = KVCache.block_bytes(source.manifest.config, torch.float32)
    free(needed_bytes(source) + 39 * block_bytes)
    # A quarter of the 40 blocks that are left.
    assert plan(source, max_sequences=4).num_blocks == 10
    assert plan(source, cache_bytes=40 * block_bytes).num_blocks == 40
    with pytest.raises(ResourceError):
        plan(source, cache_bytes=41 * block_bytes)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"resident": 0}, "resident is 0"),
        ({"resident": -1}, "resident is -1"),
        ({"max_sequences": 0}, "max_sequences 0"),
        ({"max_sequences": 9, "max_step_tokens": 8}, "max_sequences 9"),
        ({"cache_bytes": 0}, "cache_bytes is 0"),
        ({"kept_layers": -1}, "kept_layers is -1"),
        ({"kept_layers": 3}, "kept_layers is 3, outside 0..2"),
        ({"cache_bytes": -5}, "cache_bytes is -5"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"device": "mps"}, "device 'mps'"),
        ({"device": "cuda:x"}, "device 'cuda:x'"),
        ({"device": ""}, "device ''"),
    ],
)
def test_options_that_make_no_sense(root: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        Engine.from_pack(root, **options)
    assert complaint in str(caught.value)


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_device_that_is_not_there(root: Path, device: str) -> None:
    with pytest.raises(ResourceError, match="this machine has 0 CUDA devices"):
        Engine.from_pack(root, device=device)


def test_available_bytes_is_what_the_system_says() -> None:
    psutil = pytest.importorskip("psutil")
    available = memory.available_bytes(torch.device("cpu"))
    assert 0 < available <= psutil.virtual_memory().total

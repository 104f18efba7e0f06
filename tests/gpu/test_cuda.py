"""The same engine on a CUDA device: fp32 against the CPU and transformers, bf16 against fp32."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moeconsolidate.evaluation import score_texts
from moeruntime import Engine, Output, Request, SamplingParams, memory
from moeruntime.errors import ResourceError
from moeruntime.loader import Loader
from moeruntime.models import parameter_roles
from moeruntime.pack import Pack
from moeruntime.residency import Residency
from moeruntime.sampler import sample
from runtime_fixtures import (
    TEXTS_OF,
    assert_same_greedy,
    drain,
    engine_logits,
    load_reference,
    reference_logits,
    relative_error,
    texts,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TOLERANCE = 1e-4
VARIANTS = list(TEXTS_OF)
DEVICE = torch.device("cuda", 0)
SLEEP_CYCLES = 1_000_000_000  # about half a second


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def on_cpu(lossless_pack: Path) -> Iterator[Engine]:
    with Engine.from_pack(lossless_pack, device="cpu", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def on_cuda(lossless_pack: Path) -> Iterator[Engine]:
    with Engine.from_pack(lossless_pack, device="cuda", dtype="float32") as engine:
        yield engine


def make_requests(engine: Engine, per_variant: int, *, seed: int) -> list[Request]:
    """Greedy requests on real texts, variants interleaved at random."""
    rng = random.Random(seed)
    requests = []
    for variant in VARIANTS:
        for text in rng.sample(texts(TEXTS_OF[variant]), per_variant):
            document = engine.text(variant).encode(text)
            prompt = document[: rng.randint(2, min(120, len(document)))]
            params = SamplingParams(max_tokens=rng.randint(8, 20))
            requests.append(Request(variant, prompt, params))
    rng.shuffle(requests)
    return requests


def assert_same_outputs(
    actual: list[Output], expected: list[Output], requests: list[Request], reference: Engine
) -> None:
    """Equal, or parted at a choice between two logits that `reference` calls a tie."""
    for one, other, request in zip(actual, expected, requests, strict=True):
        assert one.variant == other.variant

        def logits_after(ids: Any, variant: str = one.variant) -> torch.Tensor:
            return engine_logits(reference, variant, ids, [len(ids)])[-1]

        assert_same_greedy(one.token_ids, other.token_ids, logits_after, list(request.prompt))


# -- float32 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_cpus(on_cpu: Engine, on_cuda: Engine, variant: str) -> None:
    for text in texts(TEXTS_OF[variant])[:3]:
        ids = on_cpu.text(variant).encode(text)[:200]
        num = len(ids)
        expected_TV = engine_logits(on_cpu, variant, ids, [num])
        for cuts in ([num], [5, *[1] * (num - 5)], [num - 3, 2, 1]):
            actual_TV = engine_logits(on_cuda, variant, ids, cuts)
            assert relative_error(actual_TV, expected_TV) <= TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(
    on_cuda: Engine, checkpoints: dict[str, Path], variant: str
) -> None:
    model = load_reference(checkpoints[variant], "cuda")
    ids = on_cuda.text(variant).encode(texts(TEXTS_OF[variant])[0])[:300]
    actual_TV = engine_logits(on_cuda, variant, ids, [len(ids)])
    assert relative_error(actual_TV, reference_logits(model, ids)) <= TOLERANCE


def test_greedy_tokens_are_the_cpus(on_cpu: Engine, on_cuda: Engine) -> None:
    requests = make_requests(on_cpu, 10, seed=1)
    expected = on_cpu.generate(requests)
    together = on_cuda.generate(requests)
    assert_same_outputs(together, expected, requests, on_cpu)
    alone = [on_cuda.generate([request])[0] for request in requests[:12]]
    assert_same_outputs(alone, expected[:12], requests[:12], on_cpu)


def test_scores_are_the_cpus(on_cpu: Engine, on_cuda: Engine) -> None:
    windows = [on_cpu.text("math").encode(text)[:200] for text in texts("math")[:6]]
    for expected, actual in zip(
        on_cpu.score("math", windows), on_cuda.score("math", windows), strict=True
    ):
        assert actual.device.type == "cpu"
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_sampler_chooses_what_it_chooses_on_the_cpu() -> None:
    rng = random.Random(0)
    logits_NV = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * 4
    choices = [
        SamplingParams(),
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=1.5, top_k=40),
        SamplingParams(temperature=1.0, top_p=0.9, top_k=100),
        SamplingParams(temperature=1e-30),
    ]
    params = [rng.choice(choices) for _ in range(64)]
    uniforms = [rng.random() for _ in range(64)]
    assert sample(logits_NV.to(DEVICE), params, uniforms) == sample(logits_NV, params, uniforms)


# -- bfloat16 ------------------------------------------------------------------------------------


def test_bfloat16_loses_next_to_nothing(
    on_cuda: Engine, lossless_pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = texts("python")
    exact = score_texts(on_cuda, "python", documents, context=512, max_windows=8)
    with Engine.from_pack(lossless_pack, device="cuda", dtype="bfloat16") as engine:
        rounded = score_texts(engine, "python", documents, context=512, max_windows=8)
    with capsys.disabled():
        print(
            f"\npython, {exact.num_tokens} tokens: NLL {exact.nll:.5f} in float32, "
            f"{rounded.nll:.5f} in bfloat16, difference {rounded.nll - exact.nll:+.5f} nats"
        )
    assert exact.num_tokens == rounded.num_tokens == 8 * 511
    assert abs(rounded.nll - exact.nll) <= 0.01


def test_cuda_and_the_stored_dtype_are_the_default(pack: Path) -> None:
    with Engine.from_pack(pack) as engine:
        assert engine.device == DEVICE
        assert engine.dtype == torch.bfloat16
        requests = make_requests(engine, 4, seed=2)
        for request, output in zip(requests, engine.generate(requests), strict=True):
            assert 1 <= len(output.token_ids) <= request.sampling.max_tokens
        assert engine.num_free_blocks == engine.memory.num_blocks


# -- activation on the side stream -----------------------------------------------------------------


@pytest.mark.parametrize(("resident", "max_step_tokens"), [(1, 16), (2, 24), (3, 2048)])
def test_activation_changes_nothing(
    on_cpu: Engine, lossless_pack: Path, resident: int, max_step_tokens: int
) -> None:
    rng = random.Random(resident)
    requests = make_requests(on_cpu, 16, seed=3)
    arrivals, left = [], list(requests)
    while left:
        count = rng.choice([0, 1, 2, 5])
        arrivals.append(left[:count])
        left = left[count:]
    with Engine.from_pack(
        lossless_pack,
        device="cuda",
        dtype="float32",
        resident=resident,
        max_sequences=10,
        max_step_tokens=max_step_tokens,
    ) as engine:
        outputs = drain(engine, arrivals=arrivals)
        assert engine.residency.num_activations >= len(VARIANTS)
        assert engine.residency.num_held == 0
        assert engine.num_free_blocks == engine.memory.num_blocks
    actual = [outputs[idx] for idx in range(len(requests))]
    assert_same_outputs(actual, on_cpu.generate(requests), requests, on_cpu)


def test_a_slot_is_not_overwritten_while_queued_work_reads_it(lossless_pack: Path) -> None:
    with Pack(lossless_pack) as source:
        residency = Residency(source, 1, torch.float32, Loader(DEVICE))
        parameters = parameter_roles(source.manifest.config)
        assert residency.admit("python")
        residency.wait_for("python")
        torch.cuda.synchronize()
        assert residency.ready("python")
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        before = {name: residency.weights[name][0].clone() for name in parameters}
        residency.release("python")
        assert residency.admit("math")
        assert not residency.ready("math"), "the copy must wait for what is queued"
        residency.wait_for("math")
        after = {name: residency.weights[name][0].clone() for name in parameters}
        torch.cuda.synchronize()
        assert residency.ready("math")
        for name, roles in parameters.items():
            for variant, seen in (("python", before), ("math", after)):
                stored = torch.cat([source.read_non_expert(variant, role) for role in roles])
                assert torch.equal(seen[name].cpu(), stored.float()), (variant, name)


def test_layers_arrive_one_by_one_in_the_order_of_a_step(lossless_pack: Path) -> None:
    with Pack(lossless_pack) as source:
        config = source.manifest.config
        for kept_layers in (0, 2, config.num_layers):
            with Loader(DEVICE) as loader:
                residency = Residency(source, 1, torch.float32, loader, kept_layers=kept_layers)
            assert residency.admit("python")
            gate = residency.gate(["python"])
            # Each layer's weights are read as soon as they may be, on a stream that waits for no
            # other: what is copied later must not be needed, what was copied must be there.
            seen: dict[str, torch.Tensor] = {}
            for layer in range(-1, config.num_layers + 1):
                if gate is not None:
                    gate(layer)
                for name, weights in residency.weights.items():
                    if stage_of(name, config.num_layers) == layer:
                        seen[name] = weights[0].clone()
            torch.cuda.synchronize()
            assert residency.ready("python")
            assert residency.gate(["python"]) is None
            for name, roles in parameter_roles(config).items():
                stored = torch.cat([source.read_non_expert("python", role) for role in roles])
                assert torch.equal(seen[name].cpu(), stored.float()), name


@pytest.mark.parametrize("kept_layers", [0, 2])
def test_a_prompt_runs_behind_the_copy_of_its_own_weights(
    on_cuda: Engine, lossless_pack: Path, kept_layers: int
) -> None:
    requests = make_requests(on_cuda, 3, seed=8)
    expected = [on_cuda.generate([request])[0] for request in requests]
    with Engine.from_pack(
        lossless_pack, device="cuda", dtype="float32", resident=1, kept_layers=kept_layers
    ) as engine:
        stream = engine.residency._stream
        assert stream is not None
        outputs = []
        for request in requests:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(SLEEP_CYCLES // 10)  # type: ignore[no-untyped-call]
            outputs += engine.generate([request])
        assert engine.residency.num_activations > len(VARIANTS)
    assert_same_outputs(outputs, expected, requests, on_cuda)


def test_beginnings_in_common_change_nothing(on_cuda: Engine, lossless_pack: Path) -> None:
    requests = make_requests(on_cuda, 4, seed=9)
    longer = [
        Request(r.variant, [*r.prompt, *output.token_ids], SamplingParams(max_tokens=8))
        for r, output in zip(requests, on_cuda.generate(requests), strict=True)
    ]
    with Engine.from_pack(
        lossless_pack, device="cuda", dtype="float32", prefix_cache=False
    ) as engine:
        expected = engine.generate(longer)
        assert engine.scheduler.num_reused_tokens == 0
    before = on_cuda.scheduler.num_reused_tokens
    outputs = on_cuda.generate(longer)
    assert on_cuda.scheduler.num_reused_tokens > before
    assert_same_outputs(outputs, expected, longer, on_cuda)
    assert on_cuda.num_free_blocks == on_cuda.memory.num_blocks


def stage_of(parameter: str, num_layers: int) -> int:
    if parameter.startswith("layers."):
        return int(parameter.split(".")[1])
    return -1 if parameter == "embed_tokens" else num_layers


def test_a_step_does_not_wait_for_layers_it_has_not_come_to(lossless_pack: Path) -> None:
    with Pack(lossless_pack) as source, Loader(DEVICE) as loader:
        residency = Residency(source, 1, torch.float32, loader)
        assert residency.admit("python")
        torch.cuda.synchronize()
        residency.release("python")
        stream = residency._stream
        assert stream is not None
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        assert residency.admit("math")
        events = residency._arrivals["math"]
        assert len(events) == source.manifest.config.num_layers + 2
        assert not events[0].query(), "it sleeps first"
        residency.wait_for("math", 0)
        torch.cuda.current_stream(DEVICE).synchronize()
        assert events[1].query()


def test_host_copies_are_pinned(lossless_pack: Path) -> None:
    with Engine.from_pack(lossless_pack, device="cuda", resident=2) as engine:
        copies = [memory.data for memory in engine.residency._host.values()]
        assert sum(copy.nbytes for copy in copies) == engine.memory.host_bytes
        assert all(copy.is_pinned() for copy in copies)


def test_random_aborts_leave_nothing(pack: Path) -> None:
    rng = random.Random(5)
    with Engine.from_pack(
        pack, device="cuda", resident=2, max_sequences=8, max_step_tokens=32
    ) as engine:
        waiting = make_requests(engine, 25, seed=6)
        alive: list[int] = []
        num_finished = 0
        while waiting or not engine.scheduler.idle:
            for _ in range(min(len(waiting), rng.choice([0, 1, 4]))):
                alive.append(engine.submit(waiting.pop()))
            if alive and rng.random() < 0.2:
                engine.abort(alive.pop(rng.randrange(len(alive))))
            for delta in engine.step():
                if delta.output is not None:
                    alive.remove(delta.request_id)
                    num_finished += 1
        assert num_finished > 10
        assert not alive
        assert engine.num_free_blocks == engine.memory.num_blocks
        assert engine.residency.num_held == 0


# -- memory --------------------------------------------------------------------------------------


def allocated_bytes() -> int:
    gc.collect()
    torch.cuda.synchronize()
    # What was asked for: blocks of the allocator may be up to 1 MiB larger than that.
    return int(torch.cuda.memory_stats(DEVICE)["requested_bytes.all.current"])


def test_what_is_predicted_is_taken_and_given_back(merged_pack: Path) -> None:
    def use(resident: int) -> tuple[int, int]:
        before = allocated_bytes()
        with Engine.from_pack(
            merged_pack, device="cuda", resident=resident, cache_bytes=64 * 2**20
        ) as engine:
            taken = allocated_bytes() - before
            plan = engine.memory
            predicted = plan.weights_bytes + plan.cache_bytes + plan.buffer_bytes
            engine.generate(make_requests(engine, 2, seed=7))
        return taken, predicted

    use(4)  # whatever libraries keep for good, they take on the first use
    for resident in (1, 2, 4):
        start = allocated_bytes()
        taken, predicted = use(resident)
        assert allocated_bytes() == start
        # The expert map is not counted.
        assert predicted <= taken <= predicted + 2**20


@pytest.mark.parametrize("name", ["cuda:{count}", "cuda:99"])
def test_a_device_that_is_not_there(pack: Path, name: str) -> None:
    count = torch.cuda.device_count()
    name = name.format(count=count)
    with pytest.raises(ResourceError, match=f"device '{name}': this machine has {count} CUDA"):
        Engine.from_pack(pack, device=name)


def test_a_device_that_is_too_small(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = allocated_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda device: 2**20)
        with pytest.raises(ResourceError, match="GB on cuda:0"):
            Engine.from_pack(pack, device="cuda")
    assert allocated_bytes() == before
    free, total = torch.cuda.mem_get_info(DEVICE)
    assert 0 < memory.available_bytes(DEVICE) <= total
    assert abs(memory.available_bytes(DEVICE) - free) < 2**30

"""`moec bench`: what it measures is there, adds up and is plausible; not how fast it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeconsolidate.cli import main
from moeruntime import Engine, Request, SamplingParams
from moeruntime.bench import ceilings
from moeruntime.bench.ceilings import read_files
from moeruntime.bench.decode import decode_rate, measure_decode
from moeruntime.bench.machine import median_s
from moeruntime.bench.prompts import prefill
from moeruntime.bench.work import dense_bytes, prompt_bytes, prompt_flops, step_bytes
from moeruntime.kv_cache import KVCache
from moeruntime.synthetic import SYNTHETIC_MODELS, SyntheticSource
from runtime_fixtures import pack_with_common_tensors

CPU = torch.device("cpu")
Bench = Callable[..., tuple[dict[str, Any], str, str]]


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine can do at best is found out quickly, if not well."""
    monkeypatch.setattr(ceilings, "READ_BYTES", {"cpu": 2**22})
    monkeypatch.setattr(ceilings, "GEMM_SIZE", {"cpu": 64})


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run the command; returns the JSON of its last line, all of stdout, and stderr."""

    def run(*arguments: object) -> tuple[dict[str, Any], str, str]:
        with pytest.raises(SystemExit) as end:
            main(["bench", "--device", "cpu", *map(str, arguments)])
        captured = capsys.readouterr()
        assert end.value.code == 0, captured.err
        return json.loads(captured.out.splitlines()[-1]), captured.out, captured.err

    return run


def numbers(value: Any) -> Iterator[float]:
    """Every number anywhere in a JSON document."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, int | float):
        yield value


def check(found: dict[str, Any], variants: int, resident: int, batches: list[int]) -> None:
    assert found["benchmark"] == "bench"
    assert (found["variants"], found["resident"]) == (variants, resident)
    assert all(math.isfinite(number) and number >= 0 for number in numbers(found))
    best = found["ceilings"]
    assert best["read_bytes"] > 0 < best["gemm_flops"]
    assert best["copy_bytes"] is None, "a CPU has no pinned copies"
    load = found["load"]
    assert load["bytes_per_s"] == pytest.approx(load["weights_bytes"] / load["time_s"])
    for part in found["memory"]:
        assert part["part"]
        if part["part"] == "experts kept decoded":
            assert 0 < part["measured_bytes"] <= part["predicted_bytes"]
        else:
            assert part["measured_bytes"] == part["predicted_bytes"] > 0
    assert found["peak_bytes"] > sum(part["measured_bytes"] for part in found["memory"])
    assert [(row["variants"], row["batch"]) for row in found["decode"]] == [
        (count, batch)
        for count in ([1] if resident == 1 else [1, resident])
        for batch in batches
        if batch >= count
    ]
    for row in found["decode"]:
        assert row["roofline_s"] == pytest.approx(row["step_bytes"] / best["read_bytes"])
        assert row["of_roofline"] == pytest.approx(row["roofline_s"] / row["step_s"])
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_s"])
        assert row["engine_tokens_per_s"] > 0
    one_variant = [row["step_bytes"] for row in found["decode"] if row["variants"] == 1]
    assert min(one_variant) == one_variant[0], "a batch of one reads least"
    (prefill,) = found["prefill"]
    assert prefill["of_gemm"] == pytest.approx(prefill["flops_per_s"] / best["gemm_flops"])
    assert [row["tokens"] for row in found["ttft"]][-1] == prefill["tokens"]
    for row in found["ttft"]:
        assert row["same_s"] > 0
        assert (row["after_another_s"] is None) == (resident == 1)
        assert (row["cold_s"] is None) == (resident == variants)
        assert row["copy_s"] is None


def test_a_synthetic_model(bench: Bench) -> None:
    found, out, err = bench(
        "--synthetic", "mixtral-tiny", "--variants", 3, "--code", "4+2",
        "--batches", "4,1,2", "--context", 40, "--prompt", 50,
    )  # fmt: skip
    check(found, 3, 3, [1, 2, 4])
    assert found["model"] == "synthetic:mixtral-tiny"
    assert found["code"] == "nested"
    assert found["load"]["ceiling_bytes_per_s"] is None, "nothing was read"
    assert {row["context"] for row in found["decode"]} == {40}
    assert found["prefill"][0]["tokens"] == 50
    assert err.startswith("measuring\n")
    for begun in ("at best", "loading: variant v2", "decode: batch 4, 3 variants", "50 tokens"):
        assert begun in err
    *table, last = out.splitlines()
    for heading in ("at best", "loading", "memory", "decode", "prefill", "time to the first token"):
        assert any(line.startswith(heading) for line in table), heading
    assert not any(line.startswith("{") for line in table)
    assert last.startswith("{")


def test_the_bundled_pack_with_less_than_all_resident(bench: Bench, pack: Path) -> None:
    found, out, err = bench(
        "--artifact", pack, "--resident", 2, "--batches", "1,3", "--context", 24, "--prompt", 30,
        "--json", "--quiet",
    )  # fmt: skip
    check(found, 4, 2, [1, 3])
    assert out.count("\n") == 1
    assert err == ""
    assert found["load"]["of_ceiling"] > 0
    assert "copies of cold variants, on the host" in [part["part"] for part in found["memory"]]


def test_sizes_that_are_not_given_fit_the_model(bench: Bench) -> None:
    found, _, _ = bench("--synthetic", "mixtral-tiny", "--resident", 1, "--variants", 2, "--json")
    check(found, 2, 1, [1, 8])
    assert found["prefill"][0]["tokens"] == SYNTHETIC_MODELS["mixtral-tiny"].max_context - 1
    assert 100 < found["decode"][0]["context"] < SYNTHETIC_MODELS["mixtral-tiny"].max_context


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give either --artifact PACK or --synthetic MODEL"),
        (["--artifact", "pack", "--synthetic", "mixtral-tiny"], "give either --artifact"),
        (["--artifact", "pack", "--code", "4+2"], "--variants and --code are for --synthetic"),
        (["--artifact", "pack", "--variants", "2"], "--variants and --code are for --synthetic"),
        (["--synthetic", "mixtral-7b"], "synthetic model 'mixtral-7b' is not one of"),
        (["--synthetic", "mixtral-tiny", "--code", "9+9"], "code '9+9' is neither"),
        (["--synthetic", "mixtral-tiny", "--batches", "1,x"], "--batches takes counts like"),
        (["--synthetic", "mixtral-tiny", "--batches", "0"], "--batches takes counts like"),
        (["--synthetic", "mixtral-tiny", "--batches", ""], "--batches takes counts like"),
        (["--synthetic", "mixtral-tiny", "--context", "512"], "give a smaller --context"),
        (["--synthetic", "mixtral-tiny", "--prompt", "512"], "a prompt of 512 tokens is outside"),
        (["--synthetic", "mixtral-tiny", "--resident", "0"], "--resident"),
    ],
)
def test_what_makes_no_sense_ends_with_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments, "--device", "cpu", "-q"])
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert complaint in captured.err
    assert captured.out == ""


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    out = capsys.readouterr().out
    for word in ("Examples:", "roofline", "--synthetic", "--batches", "jq"):
        assert word in out


# -- what it counts --------------------------------------------------------------------------------


def test_a_steps_bytes_are_its_experts_its_variants_and_its_context() -> None:
    with Engine(SyntheticSource("mixtral-tiny", num_variants=3), device="cpu") as engine:
        manifest, config = engine.source.manifest, engine.source.manifest.config
        faces = [[manifest.faces(0)[0][idx] for idx in (1, 4)], [manifest.faces(1)[0][7]]]
        found = step_bytes(engine, faces, variants=2, batch=5, context=32)
        weights = engine.residency.weights
        dense = sum(weight[0].nbytes for role, weight in weights.items() if role != "embed_tokens")
        assert dense_bytes(engine, 2) == 2 * dense == 2 * dense_bytes(engine, 1)
        expert = engine.model.experts[0].weights(0)
        cache = 5 * 2 * KVCache.block_bytes(config, torch.float32)
        assert found == 3 * sum(part.nbytes for part in expert) + 2 * dense + cache
        short, long = prompt_bytes(engine, 3), prompt_bytes(engine, 100)
        assert (long - dense) / (short - dense) == config.num_experts / config.top_k


def test_what_variants_have_in_common_is_read_once(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    root = pack_with_common_tensors(make_checkpoint, tmp_path / "pack")
    with Engine.from_pack(root, device="cpu") as engine:
        shapes = engine.source.manifest.config.non_expert_shapes()
        shared = engine.source.manifest.shared_roles() - {"embed_tokens"}
        common = 4 * sum(math.prod(shapes[role]) for role in shared)
        assert common > 0
        one, three = dense_bytes(engine, 1), dense_bytes(engine, 3)
        assert three == 3 * one - 2 * common


def test_operations_are_two_a_weight_and_token_and_four_a_pair_that_attends() -> None:
    config = SYNTHETIC_MODELS["mixtral-tiny"]
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = hidden * (heads + 2 * kv) + heads * hidden + config.num_experts * hidden
    layer += config.top_k * 3 * hidden * inner
    for tokens in (1, 7):
        pairs = tokens * (tokens + 1) // 2
        expected = 2 * config.num_layers * layer * tokens + 2 * config.vocab_size * hidden
        expected += 4 * config.num_layers * heads * pairs
        assert prompt_flops(config, tokens) == expected


@pytest.mark.parametrize("code", ["bf16", "4+1"])
def test_experts_are_those_the_step_went_to(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeruntime.models import decoder

    routed: list[torch.Tensor] = []
    route = decoder.route

    def spy(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        faces_TK, weights_TK = route(*arguments)
        routed.append(faces_TK)
        return faces_TK, weights_TK

    monkeypatch.setattr(decoder, "route", spy)
    best = ceilings.measure_ceilings(CPU, torch.float32)
    source = SyntheticSource("mixtral-tiny", num_variants=2, code=code)
    with Engine(source, device="cpu", prefix_cache=False) as engine:
        row = measure_decode(
            engine, best, batch=6, variants=2, context=20, max_step_tokens=2048, whole=False
        )
        assert engine.num_free_blocks == engine.memory.num_blocks
        assert engine.residency.num_held == 0
    assert row.engine_tokens_per_s is None
    layers = source.manifest.config.num_layers
    distinct = [len(faces_TK.unique()) for faces_TK in routed[:layers]]
    assert all(len(faces_TK) == 6 for faces_TK in routed[:layers])
    assert row.experts_per_layer == sum(distinct) / layers


def test_prompts_of_several_variants_share_a_step() -> None:
    source = SyntheticSource("mixtral-tiny", num_variants=3)
    found = {}
    for num_variants in (1, 3):
        with Engine(source, device="cpu", dtype="float32", max_sequences=3) as engine:
            tokens = prefill(engine, 7, num_variants=num_variants)()
            assert isinstance(tokens, Tensor) and len(tokens) == num_variants
            found[num_variants] = tokens.tolist()
            assert engine.residency.admit("v2"), "nobody holds a slot"
    assert found[1] == found[3][:1]


def test_the_engines_rate_counts_only_while_all_decode() -> None:
    with Engine(
        SyntheticSource("mixtral-tiny"), device="cpu", max_step_tokens=16, max_sequences=4
    ) as engine:
        many = [Request("v0", list(range(1, 30)), SamplingParams(max_tokens=40)) for _ in range(4)]
        rate = decode_rate(engine, many)
        assert rate is not None and rate > 0
        assert engine.scheduler.idle
        assert engine.num_free_blocks == engine.memory.num_blocks
        # The first has ended before the last begins.
        short = [Request("v0", list(range(1, 30)), SamplingParams(max_tokens=1)) for _ in range(4)]
        assert decode_rate(engine, short) is None
        assert engine.scheduler.idle


def test_files_are_read_whole(tmp_path: Path) -> None:
    sizes = (1, 2**20, 3)
    for idx, size in enumerate(sizes):
        (tmp_path / f"{idx}").write_bytes(bytes(size))
    paths = sorted(tmp_path.iterdir())
    assert read_files(paths) == read_files(paths, fresh=True) == sum(sizes)


def test_a_median_is_of_the_calls_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeruntime.bench import machine

    now = [0.0]
    durations = iter([9.0, 9.0, 1.0, 3.0, 2.0, 5.0, 4.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += next(durations)

    assert median_s(work, CPU, repeats=5, warm_up=2, most_s=1000) == 3.0
    durations = iter([100.0, 1.0, 2.0, 3.0, 4.0])
    assert median_s(work, CPU, repeats=9, warm_up=1, most_s=50) == 2.0, "three, and then no more"

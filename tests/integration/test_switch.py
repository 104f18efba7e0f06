"""Switch models from checkpoint to answer, held against transformers in fp32."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moeconsolidate import consolidate
from moeconsolidate.calibration import collect
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.evaluation import evaluate_pack
from moeconsolidate.export import export_variant
from moeconsolidate.pairs import pair_windows
from moeconsolidate.streaming import PAD, embed, output_logits, predictions, streamed_block
from moeruntime import Engine, Request, SamplingParams
from moeruntime.errors import RequestError, UsageError
from moeruntime.layout import private_stages
from runtime_fixtures import assert_same_greedy, drain, relative_error
from switch_fixtures import load_switch, make_switch, switch_greedy, switch_logprobs

TOLERANCE = 1e-4

SHAPES: dict[str, dict[str, Any]] = {
    "as usual": {},
    "over capacity": {"expert_capacity": 2},
    "every block has experts": {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 4},
    "stacks differ": {
        "num_layers": 3,
        "num_sparse_encoder_layers": 3,
        "num_decoder_layers": 6,
        "num_sparse_decoder_layers": 2,
        "expert_capacity": 3,
    },
    "a head of its own": {"tie_word_embeddings": False},
    "other buckets and heads": {
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 20,
        "d_kv": 12,
        "num_heads": 3,
        "layer_norm_epsilon": 1e-3,
        "decoder_start_token_id": 5,
    },
}


def random_ids(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 4096) for _ in range(length)]


@pytest.fixture(scope="module")
def folders(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Two variants of little capacity: many of their tokens find an expert full."""
    root = tmp_path_factory.mktemp("switch")
    small = {"num_layers": 2, "num_decoder_layers": 2, "expert_capacity": 5}
    small |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    return {
        name: make_switch(root / name, checkpoints["base"], seed=seed, **small)
        for seed, name in enumerate(("first", "second"))
    }


@pytest.fixture(scope="module")
def switch_pack(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return consolidate(folders, tmp_path_factory.mktemp("packs") / "pack", threshold=1.0).pack


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "runs",
        "far",
        "away",
        "from",
        "here",
    ]
    rng = random.Random(0)
    lines = [
        {"input": " ".join(rng.choices(words, k=9)), "target": " ".join(rng.choices(words, k=4))}
        for _ in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_of_any_switch(
    changes: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    models = {
        name: make_switch(tmp_path / name, checkpoints["base"], seed=seed, **changes)
        for seed, name in enumerate(("first", "second"))
    }
    pack = consolidate(models, tmp_path / "pack", threshold=1.0).pack
    sources = [random_ids(length, length) for length in (1, 90, 33)]
    targets = [random_ids(length, length) for length in (40, 1, 17)]
    with Engine.from_pack(pack, device="cpu", dtype="float32") as engine:
        for name, folder in models.items():
            model = load_switch(folder)
            scored = engine.score(name, targets, sources)
            for source, target, found_T, found_TV in zip(
                sources, targets, scored, engine.logprobs(name, targets, sources), strict=True
            ):
                expected_TV = switch_logprobs(model, source, target)
                assert relative_error(found_TV, expected_TV) <= TOLERANCE
                expected_T = expected_TV[torch.arange(len(target)), torch.tensor(target)]
                assert relative_error(found_T, expected_T) <= TOLERANCE


def test_capacity_matters_here(switch_pack: Path, folders: dict[str, Path]) -> None:
    model = load_switch(folders["first"])
    source, target = random_ids(60, 1), random_ids(30, 2)
    limited_TV = switch_logprobs(model, source, target)
    for module in model.modules():
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = 10**6
    assert relative_error(switch_logprobs(model, source, target), limited_TV) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "options",
    [{}, {"resident": 1, "kept_layers": 3}, {"max_sequences": 3, "max_step_tokens": 20}],
    ids=["all resident", "one resident", "small steps"],
)
def test_greedy_answers_are_transformers_alone_and_mixed(
    switch_pack: Path, folders: dict[str, Path], options: dict[str, Any]
) -> None:
    models = {name: load_switch(folder) for name, folder in folders.items()}
    prompts = [random_ids(length, length) for length in (3, 70, 20)]
    sampling = SamplingParams(max_tokens=12)
    requests = [Request(name, ids, sampling) for ids in prompts for name in models]
    expected = [switch_greedy(models[one.variant], one.prompt, 12) for one in requests]

    def check(actual: Sequence[int], request: Request, wanted: Sequence[int]) -> None:
        def logits_after(ids: Sequence[int]) -> torch.Tensor:
            target = [*ids, 0]
            return switch_logprobs(models[request.variant], request.prompt, target)[-1]

        assert_same_greedy(actual, wanted, logits_after, [])

    with Engine.from_pack(switch_pack, device="cpu", dtype="float32", **options) as engine:
        free = engine.num_free_blocks
        for request, output, wanted in zip(
            requests, engine.generate(requests), expected, strict=True
        ):
            assert output.num_prompt_tokens == len(request.prompt)
            check(output.token_ids, request, wanted)
        # One after another, joining while others decode.
        outputs = drain(engine, arrivals=[[request] for request in requests])
        in_order = [outputs[number] for number in sorted(outputs)]
        for request, output, wanted in zip(requests, in_order, expected, strict=True):
            check(output.token_ids, request, wanted)
        alone = engine.generate([requests[1]])[0]
        check(alone.token_ids, requests[1], expected[1])
        assert engine.num_free_blocks == free


def test_a_lossless_pack_exports_what_went_in(
    switch_pack: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, folder in folders.items():
        out = export_variant(switch_pack, name, tmp_path / name)
        before, after = (load_file(one / "model.safetensors") for one in (folder, out))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert torch.equal(tensor, after[key]), key


def test_an_untied_head_and_copies_of_the_embedding(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    folder = make_switch(tmp_path / "copies", checkpoints["base"], seed=0)
    tensors = load_file(folder / "model.safetensors")
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors["shared.weight"].clone()
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unread] = torch.zeros(32, 4)
    save_file(tensors, folder / "model.safetensors")
    Checkpoint("copies", folder).close()
    tensors["decoder.embed_tokens.weight"][7, 3] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Exception, match=r"decoder\.embed_tokens\.weight: differs from the embed"):
        Checkpoint("copies", folder)


def test_blocks_run_as_the_engine_runs_them(folders: dict[str, Path], pairs_file: Path) -> None:
    model = load_switch(folders["second"])
    with Checkpoint("second", folders["second"]) as checkpoint, torch.no_grad():
        windows = pair_windows(checkpoint, [pairs_file]).learned
        hidden = embed(checkpoint, windows)
        for number in range(len(checkpoint.config.blocks)):
            hidden = streamed_block(checkpoint, number).run(hidden, windows)
        to_logits = output_logits(checkpoint)
        for window, states in zip(windows, hidden, strict=True):
            hidden_TH, targets = predictions(states, window)
            source = window[0][window[0] != PAD].tolist()
            expected_TV = switch_logprobs(model, source, targets.tolist())
            found_TV = to_logits(hidden_TH).log_softmax(-1)
            assert relative_error(found_TV, expected_TV) <= TOLERANCE


def test_a_budget_is_met_and_costs_little(
    folders: dict[str, Path], pairs_file: Path, tmp_path: Path
) -> None:
    texts = {name: [pairs_file] for name in folders}
    result = consolidate(
        folders, tmp_path / "pack", threshold=0.0, budget="0.5x", calibration=texts
    )
    assert result.plan.prediction is not None
    rows = evaluate_pack(
        result.pack, [(name, pairs_file) for name in folders], folders, max_windows=8
    )
    for row in rows:
        assert row.reference is not None and row.increase is not None
        assert abs(row.increase) < 0.1 * row.reference.nll
    # Other text is noticed, as it is for any family.
    assert set(result.plan.recipe.texts) == set(folders)


@pytest.mark.parametrize(
    "choices",
    [{"merge": "regmean"}, {"align": True}, {"signal": "activations", "similarity": "cka"}],
    ids=["regmean", "align", "activations"],
)
def test_what_else_needs_calibration(
    choices: dict[str, Any], folders: dict[str, Path], pairs_file: Path, tmp_path: Path
) -> None:
    texts = {name: [pairs_file] for name in folders}
    result = consolidate(folders, tmp_path / "pack", threshold=0.0, calibration=texts, **choices)
    with Engine.from_pack(result.pack) as engine:
        assert engine.generate([Request("first", [5, 6, 7])])[0].token_ids


def test_an_encoder_decoder_cannot_write_its_own_calibration_text(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="give every variant --calibration with its pairs"):
        consolidate(folders, tmp_path / "pack", budget="0.5x")


def test_requests_that_do_not_fit(switch_pack: Path) -> None:
    with Engine.from_pack(switch_pack, cache_bytes=2 * 16_384) as engine:
        with pytest.raises(RequestError, match="cache blocks"):
            engine.submit(Request("first", [7] * 100))
        with pytest.raises(RequestError, match="more than the context of 1024"):
            engine.submit(Request("first", [7] * 1025))
        with pytest.raises(RequestError, match="prompt is empty"):
            engine.submit(Request("first", []))
        with pytest.raises(RequestError, match="0 sources for 1 windows"):
            engine.score("first", [[7, 8]])
        with pytest.raises(RequestError, match="no token to score"):
            engine.score("first", [[7, 8]], [[]])
        assert len(engine.generate([Request("first", [7] * 16, SamplingParams(16))])) == 1


@pytest.mark.parametrize("resident", [1, 2])
def test_memory_is_what_was_predicted(switch_pack: Path, resident: int) -> None:
    with Engine.from_pack(switch_pack, device="cpu", resident=resident) as engine:
        plan, cache = engine.memory, engine.model.cache
        assert plan.cache_bytes == sum(one.nbytes for one in (*cache.keys, *cache.values))
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in engine.residency.weights.values()
        }
        assert plan.shared_bytes + plan.resident_bytes == sum(storages.values())
        assert plan.host_bytes == engine.residency.copies_bytes[1]
        pools = [tensor for pool in engine.model.experts for tensor in pool.tensors()]
        assert plan.experts_bytes == sum(tensor.nbytes for tensor in pools)


def test_weights_are_not_used_before_they_have_arrived(
    switch_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.from_pack(switch_pack, device="cpu") as engine:
        config = engine.source.manifest.config
        stage_of = {
            parameter: number - 1
            for number, stage in enumerate(private_stages(config, frozenset()))
            for parameter in stage.places
        }
        arrived = -2
        used: set[str] = set()

        def gate(layer: int) -> None:
            nonlocal arrived
            arrived = layer

        class Weights(dict[str, torch.Tensor]):
            def __getitem__(self, parameter: str) -> torch.Tensor:
                assert stage_of[parameter] <= arrived, parameter
                used.add(parameter)
                return super().__getitem__(parameter)

        monkeypatch.setattr(engine.model, "weights", Weights(engine.model.weights))
        monkeypatch.setattr(engine.residency, "gate", lambda variants: gate)
        engine.generate([Request("first", [5, 6, 7], SamplingParams(max_tokens=3))])
        assert used == set(stage_of)


def test_statistics_are_those_of_transformers_gradients(
    folders: dict[str, Path], pairs_file: Path
) -> None:
    model = load_switch(folders["first"])
    with Checkpoint("first", folders["first"]) as checkpoint:
        config = checkpoint.config
        windows = pair_windows(checkpoint, [pairs_file]).learned
        found = collect(checkpoint, windows, seed=5)
    outputs: dict[tuple[int, int], torch.Tensor] = {}
    counts = torch.zeros(config.num_layers, config.num_experts, dtype=torch.int64)

    def watch(layer: int, expert: int) -> Any:
        def forward(_module: object, _args: object, out: torch.Tensor) -> None:
            counts[layer, expert] += len(out)

            def add(gradient: torch.Tensor) -> None:
                one = outputs.setdefault((layer, expert), torch.zeros(gradient.shape[-1]))
                one += gradient.square().sum(dim=0)

            out.register_hook(add)

        return forward

    for layer, block in enumerate(config.layers):
        stack, number = block.split(".")
        sublayers = getattr(model, stack).block[int(number)].layer
        for expert in range(config.num_experts):
            wi = sublayers[-1].mlp.experts[f"expert_{expert}"].wi
            wi.register_forward_hook(watch(layer, expert))
    generator = torch.Generator().manual_seed(5)
    num_tokens = 0
    for source, decoded in windows:
        ids, start = source[source != PAD], decoded[decoded != PAD][:-1]
        logits_TV = model(input_ids=ids[None], decoder_input_ids=start[None]).logits[0]
        signs_TV = torch.randint(0, 2, logits_TV.shape, generator=generator, dtype=torch.int8)
        root_TV = logits_TV.detach().softmax(-1).sqrt()
        signed_TV = root_TV * (2.0 * signs_TV - 1)
        logits_TV.backward(signed_TV - root_TV.square() * signed_TV.sum(-1, keepdim=True))
        num_tokens += len(logits_TV)
    assert found.num_tokens == num_tokens
    assert torch.equal(found.num_routed_LE, counts)
    for (layer, expert), expected_R in outputs.items():
        found_R = found.layers[layer]["gate_up"].outputs_ER[expert]
        torch.testing.assert_close(found_R, expected_R, rtol=1e-3, atol=1e-9)

"""The engine against transformers on the original checkpoints, fp32.

Logits within 1e-4 of the largest one, greedy tokens identical: alone or in mixed batches, however
prompts are cut and whoever comes and goes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moeconsolidate import consolidate
from moeruntime import Engine, Output, Request, SamplingParams
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

TOLERANCE = 1e-4
VARIANTS = list(TEXTS_OF)


@pytest.fixture(scope="module")
def engine(lossless_pack: Path) -> Iterator[Engine]:
    with Engine.from_pack(lossless_pack, device="cpu", dtype="float32") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> dict[str, Any]:
    return {name: load_reference(folder) for name, folder in checkpoints.items()}


def random_cuts(length: int, rng: random.Random) -> list[int]:
    """Chunks of a prompt, and decodes one by one, in any order."""
    cuts = []
    while length:
        cuts.append(min(length, rng.choice([1, 1, 1, 2, 7, 16, 33])))
        length -= cuts[-1]
    return cuts


# -- logits of the bundled variants ----------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_and_decode_logits(engine: Engine, models: dict[str, Any], variant: str) -> None:
    rng = random.Random(variant)
    for text in texts(TEXTS_OF[variant])[:3]:
        ids = engine.text(variant).encode(text)[:150]
        expected_TV = reference_logits(models[variant], ids)
        prefill_TV = engine_logits(engine, variant, ids, [len(ids)])
        assert relative_error(prefill_TV, expected_TV) <= TOLERANCE
        decode_TV = engine_logits(engine, variant, ids, [5, *[1] * (len(ids) - 5)])
        assert relative_error(decode_TV, expected_TV) <= TOLERANCE
        chunked_TV = engine_logits(engine, variant, ids, random_cuts(len(ids), rng))
        assert relative_error(chunked_TV, expected_TV) <= TOLERANCE


def test_logits_at_the_far_end_of_the_context(engine: Engine, models: dict[str, Any]) -> None:
    limit = engine.source.manifest.config.max_context
    encode = engine.text("base").encode_document
    ids = [token for text in texts("english")[:20] for token in encode(text)][:limit]
    assert len(ids) == limit
    expected_TV = reference_logits(models["base"], ids)
    actual_TV = engine_logits(engine, "base", ids, [limit - 200, 199, 1])
    assert relative_error(actual_TV[-300:], expected_TV[-300:]) <= TOLERANCE


def test_the_oracle_can_tell_variants_apart(engine: Engine, models: dict[str, Any]) -> None:
    ids = engine.text("math").encode(texts("math")[0])[:100]
    wrong_TV = engine_logits(engine, "shell", ids, [len(ids)])
    assert relative_error(wrong_TV, reference_logits(models["math"], ids)) > 100 * TOLERANCE


# -- logits of other shapes ------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "sliding window": {"sliding_window": 8},
    "narrowest window": {"sliding_window": 2},  # with 1, transformers' cache keeps every token
    "tied embeddings": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16},
    "one head each": {"num_key_value_heads": 4},
    "one for all heads": {"num_key_value_heads": 1},
    "top 1": {"num_experts_per_tok": 1},
    "top 3": {"num_experts_per_tok": 3},
    "all experts": {"num_experts_per_tok": 4},
    "all at once": {
        "sliding_window": 8,
        "tie_word_embeddings": True,
        "head_dim": 10,
        "num_experts_per_tok": 3,
        "rope_parameters": {"rope_theta": 300.0, "rope_type": "default"},
        "rms_norm_eps": 1e-3,
    },
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_of_any_mixtral(
    changes: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **{
            "vocab_size": 4096,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 256,
            "sliding_window": None,
            "initializer_range": 0.2,
            **changes,
        }
    )
    folders: dict[str, Path] = {}
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = MixtralForCausalLM(config)
        for parameter, tensor in model.named_parameters():
            if "norm" in parameter:  # all ones otherwise, and then a wrong norm looks right
                tensor.data.uniform_(0.5, 1.5)
        folders[name] = tmp_path / name
        model.save_pretrained(folders[name])
        AutoTokenizer.from_pretrained(checkpoints["base"]).save_pretrained(folders[name])
    packed = consolidate(folders, tmp_path / "pack", threshold=1.0).pack
    rng = random.Random(0)
    ids = [rng.randrange(4096) for _ in range(60)]
    with Engine.from_pack(packed, device="cpu", dtype="float32", resident=1) as engine:
        for name, folder in folders.items():
            expected_TV = reference_logits(load_reference(folder), ids)
            for cuts in ([60], [20, *[1] * 40], random_cuts(60, rng)):
                actual_TV = engine_logits(engine, name, ids, cuts)
                assert relative_error(actual_TV, expected_TV) <= TOLERANCE
        requests = [
            Request(name, ids[start : start + 20], SamplingParams(max_tokens=12))
            for start in (0, 20, 40)
            for name in folders
        ]
        for request, output in zip(requests, engine.generate(requests), strict=True):
            model = load_reference(folders[request.variant])
            expected = greedy(model, list(request.prompt), 12, eos_ids=(2,))
            assert_same_greedy(
                output.token_ids,
                expected,
                lambda ids, model=model: reference_logits(model, ids)[-1],
                list(request.prompt),
            )


# -- greedy text of 100 prompts --------------------------------------------------------------------


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], max_tokens: int, eos_ids: tuple[int, ...]) -> list[int]:
    """What transformers goes on with, one sequence alone."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=list(eos_ids),
        pad_token_id=3,
    )
    return output[0, len(prompt) :].tolist()


@dataclass(frozen=True)
class Case:
    request: Request
    expected: list[int]


@pytest.fixture(scope="module")
def cases(engine: Engine, models: dict[str, Any]) -> list[Case]:
    """25 prompts a variant, and transformers' answers, each alone."""
    rng = random.Random(2505)
    made = []
    for variant in VARIANTS:
        for text in rng.sample(texts(TEXTS_OF[variant]), 25):
            document = engine.text(variant).encode(text)
            prompt = document[: rng.randint(2, min(90, len(document)))]
            max_tokens = rng.randint(12, 16)
            eos_ids = tuple(sorted(engine.text(variant).eos_ids))
            expected = greedy(models[variant], prompt, max_tokens, eos_ids)
            params = SamplingParams(max_tokens=max_tokens)
            made.append(Case(Request(variant, prompt, params), expected))
    return made


def assert_all_as_expected(
    outputs: dict[int, Output], order: list[Case], models: dict[str, Any]
) -> None:
    """`outputs` by position in `order`."""
    assert sorted(outputs) == list(range(len(order)))
    for idx, case in enumerate(order):
        model = models[case.request.variant]
        assert outputs[idx].variant == case.request.variant
        assert_same_greedy(
            outputs[idx].token_ids,
            case.expected,
            lambda ids, model=model: reference_logits(model, ids)[-1],
            list(case.request.prompt),
        )


def test_greedy_tokens_alone(engine: Engine, cases: list[Case], models: dict[str, Any]) -> None:
    outputs = {idx: engine.generate([case.request])[0] for idx, case in enumerate(cases)}
    assert_all_as_expected(outputs, cases, models)
    lengths = [len(output.token_ids) for output in outputs.values()]
    assert sum(lengths) > 1000, "too little was generated to say anything"


@pytest.mark.parametrize(
    ("num_cases", "resident", "max_sequences", "max_step_tokens"),
    [(100, 2, 12, 24), (40, 1, 5, 5), (100, 4, 32, 2048)],
)
def test_greedy_tokens_in_mixed_batches(
    lossless_pack: Path,
    cases: list[Case],
    models: dict[str, Any],
    num_cases: int,
    resident: int,
    max_sequences: int,
    max_step_tokens: int,
) -> None:
    rng = random.Random(resident)
    order = rng.sample(cases, num_cases)
    arrivals, left = [], list(order)
    while left:
        count = rng.choice([0, 0, 1, 2, 3, 8])
        arrivals.append([case.request for case in left[:count]])
        left = left[count:]
    with Engine.from_pack(
        lossless_pack,
        device="cpu",
        dtype="float32",
        resident=resident,
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
    ) as engine:
        num_blocks = engine.num_free_blocks
        outputs = drain(engine, arrivals=arrivals)
        assert engine.num_free_blocks == num_blocks
        assert engine.residency.num_held == 0
        if resident < 4:
            assert engine.residency.num_activations >= 4
        else:
            assert engine.residency.num_activations == 0
    assert_all_as_expected(outputs, order, models)


# -- requests that come and go ---------------------------------------------------------------------


def test_random_aborts_disturb_nobody_and_leave_nothing(pack: Path) -> None:
    rng = random.Random(300)
    requests = []
    for _ in range(300):
        variant = rng.choice(VARIANTS)
        prompt = [1, *(rng.randrange(32, 4096) for _ in range(rng.randint(0, 50)))]
        params = SamplingParams(
            max_tokens=rng.randint(1, 6),
            temperature=rng.choice([0.0, 0.8, 1.5]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            seed=rng.randrange(2**32),
        )
        requests.append(Request(variant, prompt, params))
    with Engine.from_pack(pack, device="cpu", dtype="float32") as engine:
        solo = [engine.generate([request])[0] for request in requests]
    with Engine.from_pack(
        pack,
        device="cpu",
        dtype="float32",
        resident=2,
        max_sequences=10,
        max_step_tokens=40,
        cache_bytes=2 * 2**20,
    ) as engine:
        num_blocks = engine.num_free_blocks
        waiting, alive, aborted = list(requests), [], set()
        outputs: dict[int, Output] = {}
        while waiting or not engine.scheduler.idle:
            for _ in range(min(len(waiting), rng.choice([0, 1, 2, 5]))):
                alive.append(engine.submit(waiting.pop(0)))
            if alive and rng.random() < 0.15:
                victim = alive.pop(rng.randrange(len(alive)))
                engine.abort(victim)
                aborted.add(victim)
            for delta in engine.step():
                assert delta.request_id in alive
                if delta.output is not None:
                    outputs[delta.request_id] = delta.output
                    alive.remove(delta.request_id)
        assert engine.num_free_blocks == num_blocks
        assert engine.residency.num_held == 0
        engine.abort(0)
        engine.abort(10**9)
    assert len(aborted) > 20
    assert sorted([*outputs, *aborted]) == list(range(300))
    for request_id, output in outputs.items():
        assert output == solo[request_id], requests[request_id]

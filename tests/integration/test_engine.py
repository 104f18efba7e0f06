"""What the engine promises its callers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from moeruntime import Engine, Output, Request, SamplingParams
from moeruntime.errors import RequestError, ResourceError, TokenizerError
from moeruntime.request import Delta
from runtime_fixtures import (
    TEXTS_OF,
    drain,
    load_reference,
    pack_with_common_tensors,
    reference_logits,
    texts,
)

VARIANTS = list(TEXTS_OF)
PROMPTS = {
    "base": "The city council",
    "python": "def read_lines(path):\n    ",
    "math": "Tom has 3 apples and buys 4 more.",
    "shell": "list all files",
}


@pytest.fixture(scope="module")
def engine(pack: Path) -> Iterator[Engine]:
    with Engine.from_pack(pack, device="cpu") as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        assert_clean(request.getfixturevalue("engine"))


def assert_clean(engine: Engine) -> None:
    assert engine.scheduler.idle
    assert engine.num_free_blocks == engine.memory.num_blocks
    assert engine.residency.num_held == 0
    assert not engine._live


def ask(engine: Engine, variant: str, prompt: Any, *, chat: bool = False, **params: Any) -> Output:
    (output,) = engine.generate([Request(variant, prompt, SamplingParams(**params), chat)])
    return output


# -- generating ------------------------------------------------------------------------------------


def test_defaults_are_the_cpu_in_float32_with_everything_resident(pack: Path) -> None:
    with Engine.from_pack(pack) as engine:
        if not torch.cuda.is_available():
            assert engine.device == torch.device("cpu")
            assert engine.dtype == torch.float32
        assert engine.memory.host_bytes == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_stream_says_what_generate_says(engine: Engine, variant: str, temperature: float) -> None:
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=11)
    request = Request(variant, PROMPTS[variant], params)
    (expected,) = engine.generate([request])
    deltas = list(engine.stream(request))
    assert "".join(delta.text for delta in deltas) == expected.text
    assert tuple(token for delta in deltas for token in delta.token_ids) == expected.token_ids
    assert deltas[-1].output == expected
    assert all(delta.output is None for delta in deltas[:-1])
    assert len({delta.request_id for delta in deltas}) == 1


def test_a_stream_that_is_dropped_is_aborted(engine: Engine) -> None:
    stream = engine.stream(Request("python", "x = ", SamplingParams(max_tokens=50)))
    next(stream)
    assert not engine.scheduler.idle
    stream.close()
    assert_clean(engine)


def test_requests_submitted_before_lose_nothing_to_generate_or_stream(engine: Engine) -> None:
    params = SamplingParams(max_tokens=12)
    requests = [Request(name, PROMPTS[name], params) for name in VARIANTS]
    expected = engine.generate(requests)
    first, second = engine.submit(requests[0]), engine.submit(requests[1])
    assert engine.generate(requests[2:3]) == expected[2:3]
    assert list(engine.stream(requests[3]))[-1].output == expected[3]
    deltas = engine.step()
    while not engine.scheduler.idle:
        deltas += engine.step()
    for request_id, output in ((first, expected[0]), (second, expected[1])):
        mine = [delta for delta in deltas if delta.request_id == request_id]
        assert tuple(token for delta in mine for token in delta.token_ids) == output.token_ids
        assert "".join(delta.text for delta in mine) == output.text
        assert [delta.output for delta in mine if delta.output] == [output]
    assert len(deltas) == 2 * 12
    assert engine.step() == []


def test_streams_may_be_read_in_turns(engine: Engine) -> None:
    params = SamplingParams(max_tokens=10)
    requests = [Request(name, PROMPTS[name], params) for name in ("python", "math")]
    expected = engine.generate(requests)
    left = [engine.stream(request) for request in requests]
    seen: list[list[Delta]] = [[], []]
    for _ in range(11):
        for idx, stream in enumerate(left):
            seen[idx] += islice(stream, 1)
    for deltas, output in zip(seen, expected, strict=True):
        assert tuple(token for delta in deltas for token in delta.token_ids) == output.token_ids
        assert "".join(delta.text for delta in deltas) == output.text
        assert deltas[-1].output == output


def test_an_aborted_request_says_nothing_more(engine: Engine) -> None:
    request = Request("python", PROMPTS["python"], SamplingParams(max_tokens=6))
    early = engine.submit(request)
    engine.generate([request])
    engine.abort(early)
    assert engine.step() == []
    stream = engine.stream(request)
    engine.abort(next(stream).request_id)
    assert list(stream) == []


def test_outputs_come_in_the_order_of_the_requests(engine: Engine) -> None:
    requests = [
        Request(VARIANTS[idx % 4], [1, 100 + idx], SamplingParams(max_tokens=1 + (7 * idx) % 10))
        for idx in range(40)
    ]
    outputs = engine.generate(requests)
    for request, output in zip(requests, outputs, strict=True):
        assert output.variant == request.variant
        assert output.num_prompt_tokens == 2
        ended = output.token_ids[-1] in engine.text(request.variant).eos_ids
        assert output.finish_reason == ("stop" if ended else "length")
        assert ended or len(output.token_ids) == request.sampling.max_tokens
    assert engine.generate([]) == []


@pytest.mark.parametrize("max_tokens", [1, 2, 15, 16, 17])
def test_max_tokens(engine: Engine, max_tokens: int) -> None:
    output = ask(engine, "python", "import os\n", max_tokens=max_tokens)
    assert len(output.token_ids) == max_tokens
    assert output.finish_reason == "length"
    assert output.text == engine.text("python").tokenizer.decode(list(output.token_ids))


def test_seeds_repeat_alone_and_in_company(engine: Engine) -> None:
    def params(seed: int | None) -> SamplingParams:
        return SamplingParams(max_tokens=12, temperature=1.0, top_p=0.95, seed=seed)

    request = Request("math", PROMPTS["math"], params(5))
    (alone,) = engine.generate([request])
    company = [Request(name, PROMPTS[name], params(seed)) for name in VARIANTS for seed in (1, 2)]
    assert engine.generate([*company, request, *company])[len(company)] == alone
    (other,) = engine.generate([Request("math", PROMPTS["math"], params(6))])
    assert other.token_ids != alone.token_ids
    unseeded = {
        output.token_ids
        for output in engine.generate([Request("math", PROMPTS["math"], params(None))] * 4)
    }
    assert len(unseeded) > 1


def test_top_k_of_one_is_greedy(engine: Engine) -> None:
    greedy = ask(engine, "base", PROMPTS["base"], max_tokens=12)
    sampled = ask(engine, "base", PROMPTS["base"], max_tokens=12, temperature=1.0, top_k=1)
    assert sampled == greedy


# -- prompts ---------------------------------------------------------------------------------------


def test_a_prompt_may_be_token_ids(engine: Engine) -> None:
    request = Request("python", "def f(x):\n")
    ids = engine.tokenize(request)
    assert ids[0] == 1, "the tokenizer puts <s> first"
    by_text = ask(engine, "python", request.prompt, max_tokens=10)
    assert ask(engine, "python", ids, max_tokens=10) == by_text
    assert ask(engine, "python", tuple(ids), max_tokens=10) == by_text
    assert engine.tokenize(Request("python", ids)) == ids


@pytest.mark.parametrize("variant", ["math", "shell"])
def test_chat_is_the_template_around_the_prompt(engine: Engine, variant: str) -> None:
    prompt = PROMPTS[variant]
    plain = f"<|user|>{prompt}<|assistant|>"
    wrapped = ask(engine, variant, prompt, chat=True, max_tokens=12)
    assert ask(engine, variant, plain, max_tokens=12) == wrapped
    messages = [{"role": "user", "content": prompt}]
    assert ask(engine, variant, messages, max_tokens=12) == wrapped
    turns = [*messages, {"role": "assistant", "content": "ls"}, *messages]
    ids = engine.tokenize(Request(variant, turns))
    expected = f"{plain}ls<|end|>{plain}"
    assert ids == engine.tokenize(Request(variant, expected))


def test_a_chat_ends_with_the_end_of_the_turn(engine: Engine) -> None:
    outputs = [
        ask(engine, "shell", text.split("<|user|>")[1].split("<|assistant|>")[0], chat=True)
        for text in texts("shell")[:6]
    ]
    finished = [output for output in outputs if output.finish_reason == "stop"]
    assert finished
    for output in finished:
        assert output.token_ids[-1] in engine.text("shell").eos_ids
        assert output.text == engine.text("shell").tokenizer.decode(list(output.token_ids))
        assert "<|end|>" not in output.text


def test_the_end_of_a_sequence_can_be_ignored(engine: Engine) -> None:
    numbers = random.Random(2)
    requests = [
        Request("shell", [numbers.randrange(32, 4000)], SamplingParams(max_tokens=60))
        for _ in range(12)
    ]
    ended = engine.generate(requests)
    assert {output.finish_reason for output in ended} == {"stop", "length"}
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    on = engine.generate([Request("shell", request.prompt, params) for request in requests])
    for before, output in zip(ended, on, strict=True):
        assert output.finish_reason == "length"
        assert len(output.token_ids) == 60
        assert output.token_ids[: len(before.token_ids)] == before.token_ids
        assert output.text.startswith(before.text)


@pytest.mark.parametrize("name", ["nobody", "", "BASE", "../base", "x" * 500])
def test_an_unknown_variant_lists_the_known_ones(engine: Engine, name: str) -> None:
    for call in (
        lambda: engine.submit(Request(name, "x")),
        lambda: engine.generate([Request(name, "x")]),
        lambda: list(engine.stream(Request(name, "x"))),
        lambda: engine.tokenize(Request(name, "x")),
        lambda: engine.score(name, [[1, 2]]),
    ):
        with pytest.raises(RequestError, match="it has: base, python, math, shell") as caught:
            call()
        assert len(str(caught.value)) < 400


BAD_REQUESTS: dict[str, tuple[Request, str]] = {
    "no tokens": (Request("base", []), "prompt is empty"),
    "negative id": (Request("base", [1, -1]), "token id -1 is outside the vocabulary of 4096"),
    "id past the end": (Request("base", [1, 4096]), "token id 4096 is outside"),
    "booleans": (Request("base", [True, False]), "neither text, token ids nor chat messages"),
    "floats": (Request("base", [1.0]), "neither text"),  # type: ignore[list-item]
    "mixed": (Request("base", [1, {"role": "user"}]), "neither text"),  # type: ignore[list-item]
    "surrogate": (Request("base", "\ud800"), "lone surrogate"),
    "too long": (
        Request("base", [5] * 2048),
        "prompt of 2048 tokens leaves no room in the context",
    ),
    "far too long": (Request("base", "a b " * 5000), "leaves no room in the context of 2048"),
}


@pytest.mark.parametrize(("request_", "complaint"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_one_bad_request_and_none_has_run(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, request_: Request, complaint: str
) -> None:
    steps = []
    original = Engine._run
    monkeypatch.setattr(Engine, "_run", lambda self: steps.append(1) or original(self))
    good = Request("python", "x", SamplingParams(max_tokens=2))
    with pytest.raises(RequestError, match=complaint):
        engine.generate([good, good, request_, good])
    assert not steps
    assert_clean(engine)
    assert len(engine.generate([good])[0].token_ids) == 2
    assert steps


def test_a_chat_without_a_template_is_refused(engine: Engine) -> None:
    with pytest.raises(TokenizerError, match="variant 'base' has no chat template"):
        ask(engine, "base", "hello", chat=True)


def test_generation_ends_where_the_context_ends(engine: Engine) -> None:
    ids = engine.text("python").encode("x = 1\n" * 2000)[:2044]
    output = ask(engine, "python", ids, max_tokens=100)
    assert len(output.token_ids) == 4
    assert output.finish_reason == "length"
    assert len(ask(engine, "python", ids[:2] * 1023 + [5], max_tokens=9).token_ids) == 1


def test_a_request_that_no_cache_can_hold_is_refused(pack: Path) -> None:
    with Engine.from_pack(pack, device="cpu", cache_bytes=100_000) as engine:
        room = engine.memory.num_blocks * 16
        assert room < 200
        with pytest.raises(RequestError, match=f"cache blocks, there are {room // 16}"):
            ask(engine, "base", [5] * 20, max_tokens=room - 18)
        assert len(ask(engine, "base", [5] * 20, max_tokens=room - 19).token_ids) == room - 19
        assert_clean(engine)


# -- stop strings and the end ----------------------------------------------------------------------


def test_stop_strings_end_the_text_before_them(engine: Engine) -> None:
    whole = ask(engine, "python", PROMPTS["python"], max_tokens=40)
    for start, length in ((3, 1), (5, 4), (10, 8), (len(whole.text) - 3, 3)):
        stop = whole.text[start : start + length]
        at = whole.text.find(stop)
        output = ask(engine, "python", PROMPTS["python"], max_tokens=40, stop=(stop, "\0never"))
        assert output.text == whole.text[:at]
        assert output.finish_reason == "stop"
        assert output.token_ids == whole.token_ids[: len(output.token_ids)]
        request = Request("python", PROMPTS["python"], SamplingParams(max_tokens=40, stop=(stop,)))
        assert "".join(delta.text for delta in engine.stream(request)) == whole.text[:at]


def test_a_stop_string_that_only_begins_is_shown_in_the_end(engine: Engine) -> None:
    whole = ask(engine, "python", PROMPTS["python"], max_tokens=10)
    stop = whole.text[-2:] + "\0never"
    output = ask(engine, "python", PROMPTS["python"], max_tokens=10, stop=(stop,))
    assert output == whole


def test_the_end_of_sequence_token_is_counted_and_not_shown(engine: Engine) -> None:
    for text in texts("tldr")[:12]:
        output = ask(engine, "base", text, max_tokens=30)
        if output.finish_reason == "stop":
            assert output.token_ids[-1] == 2
            assert 2 not in output.token_ids[:-1]
            assert "</s>" not in output.text
            return
    pytest.fail("no text was ended by the model itself; choose others")


# -- scoring ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_transformers_log_probabilities(
    lossless_pack: Path, checkpoints: dict[str, Path], variant: str
) -> None:
    model = load_reference(checkpoints[variant])
    with Engine.from_pack(lossless_pack, device="cpu", dtype="float32", resident=1) as engine:
        encode = engine.text(variant).encode_document
        windows = [encode(text)[:120] for text in texts(TEXTS_OF[variant])[:3]]
        windows += [windows[0][:2], windows[0][:1], windows[1][:17]]
        scores = engine.score(variant, windows)
        assert_clean(engine)
    assert len(scores) == len(windows)
    for window, logprobs in zip(windows, scores, strict=True):
        assert logprobs.dtype == torch.float32
        assert len(logprobs) == len(window) - 1
        expected = reference_logits(model, window)[:-1].log_softmax(-1)
        expected = expected.gather(1, torch.tensor(window[1:], dtype=torch.long)[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)


def test_scores_do_not_depend_on_how_windows_are_grouped(pack: Path) -> None:
    windows = [[1, *range(50 + idx, 90 + 2 * idx)] for idx in range(8)]
    results = []
    for options in ({}, {"max_step_tokens": 50}, {"cache_bytes": 200_000}):
        with Engine.from_pack(pack, device="cpu", max_sequences=8, **options) as engine:
            results.append(torch.cat(engine.score("shell", windows)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


def test_whole_predictions_hold_the_scores(engine: Engine) -> None:
    windows = [[1, *range(50, 90)], [1, 7], [3, *range(200, 260)]]
    scores = engine.score("math", windows)
    found = list(engine.logprobs("math", windows))
    for ids, score_T, logprobs_TV in zip(windows, scores, found, strict=True):
        assert (logprobs_TV.shape, logprobs_TV.dtype) == ((len(ids), 4096), torch.float32)
        torch.testing.assert_close(logprobs_TV.exp().sum(-1), torch.ones(len(ids)))
        picked_T = logprobs_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(picked_T, score_T)
    assert_clean(engine)


def test_predictions_may_be_left_half_read(engine: Engine) -> None:
    reading = engine.logprobs("base", [[1, 2, 3], [4, 5]])
    next(reading)
    reading.close()
    assert_clean(engine)


def test_a_window_must_fit_and_hold_something(engine: Engine) -> None:
    for window, complaint in (
        ([], "a window is empty"),
        ([5] * 2049, "2049 tokens are more than the context of 2048"),
        ([1, 5000], "token id 5000 is outside"),
    ):
        with pytest.raises(RequestError, match=complaint):
            engine.score("base", [[1, 2, 3], window])
        assert_clean(engine)
    assert engine.score("base", []) == []


def test_scoring_waits_for_no_one(pack: Path) -> None:
    with Engine.from_pack(pack, device="cpu", resident=1) as engine:
        request_id = engine.submit(Request("python", "x = ", SamplingParams(max_tokens=30)))
        engine.step()
        with pytest.raises(ResourceError, match="every resident slot is held"):
            engine.score("math", [[1, 2, 3]])
        # The variant that runs may be scored beside itself.
        assert len(engine.score("python", [[1, 2, 3]])[0]) == 2
        engine.abort(request_id)
        assert len(engine.score("math", [[1, 2, 3]])[0]) == 2
        assert_clean(engine)


# -- residency -------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_how_many_are_resident_changes_nothing(engine: Engine, pack: Path, resident: int) -> None:
    requests = [
        Request(name, PROMPTS[name], SamplingParams(max_tokens=8, temperature=temperature, seed=3))
        for temperature in (0.0, 1.0)
        for name in VARIANTS
    ]
    expected = engine.generate(requests)
    with Engine.from_pack(pack, device="cpu", resident=resident, kept_layers=resident) as small:
        assert small.generate(requests) == expected
        assert small.residency.num_activations >= 4
        assert_clean(small)
    assert engine.residency.num_activations == 0


def test_a_variant_is_activated_when_its_request_is_queued(pack: Path) -> None:
    with Engine.from_pack(pack, device="cpu", resident=2, max_sequences=1) as engine:
        first = engine.submit(Request("python", "x = ", SamplingParams(max_tokens=30)))
        engine.step()
        second = engine.submit(Request("math", [1, 2, 3]))
        assert engine.residency.num_activations == 2, "although the batch is full"
        engine.submit(Request("shell", [1, 2, 3], SamplingParams(max_tokens=2)))
        assert engine.residency.num_activations == 2, "both slots are held"
        engine.abort(second)
        assert engine.residency.num_held == 1
        engine.step()
        assert engine.residency.num_activations == 3
        engine.abort(first)
        drain(engine)
        assert_clean(engine)


def test_more_resident_than_there_are_is_all(engine: Engine, pack: Path) -> None:
    with Engine.from_pack(pack, device="cpu", resident=99) as large:
        assert large.memory.weights_bytes == engine.memory.weights_bytes
        assert large.memory.host_bytes == 0


def test_tensors_in_common_serve_every_variant(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    packed = pack_with_common_tensors(make_checkpoint, tmp_path / "pack")
    rng_ids = [[1, *range(40 + 7 * idx, 60 + 9 * idx)] for idx in range(3)]
    requests = [
        Request(name, ids, SamplingParams(max_tokens=6)) for ids in rng_ids for name in "abc"
    ]
    answers = []
    for resident in (1, 2, 3):
        with Engine.from_pack(packed, device="cpu", resident=resident) as engine:
            answers.append(engine.generate(requests))
    assert answers[0] == answers[1] == answers[2]
    assert len({output.token_ids for output in answers[0]}) > 3


def test_requests_may_be_submitted_between_steps(engine: Engine) -> None:
    requests = [Request(name, PROMPTS[name], SamplingParams(max_tokens=6)) for name in VARIANTS]
    expected = engine.generate(requests)
    first = engine._next_id
    outputs = drain(engine, arrivals=[[one] for one in requests])
    assert [outputs[first + idx] for idx in range(4)] == expected
    assert engine.step() == []


# -- loading ---------------------------------------------------------------------------------------


def test_progress_says_every_part(pack: Path) -> None:
    lines: list[str] = []
    Engine.from_pack(pack, device="cpu", on_progress=lines.append).close()
    assert [line for line in lines if line.startswith("variant")] == [
        f"variant {name}" for name in VARIANTS
    ]
    assert [line for line in lines if line.startswith("experts")] == [
        f"experts of layer {layer}/4" for layer in range(1, 5)
    ]


def test_importing_the_runtime_is_cheap_and_its_names_bring_no_compiler() -> None:
    script = """
import json, sys
import moeruntime
dir(moeruntime)
cheap = sorted(sys.modules)
for name in moeruntime.__all__:
    getattr(moeruntime, name)
print(json.dumps([cheap, sorted(sys.modules)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    cheap, full = (
        {module.partition(".")[0] for module in modules} for modules in json.loads(done.stdout)
    )
    assert "moeruntime" in cheap
    never = {"scipy", "huggingface_hub", "typer", "rich", "transformers", "moeconsolidate"}
    assert not cheap & (never | {"torch", "numpy", "tokenizers", "jinja2"})
    assert not full & never
    assert "torch" in full


def test_a_name_the_runtime_does_not_have() -> None:
    import moeruntime

    with pytest.raises(AttributeError, match="no attribute 'Tenant'"):
        _ = moeruntime.Tenant

"""Log-probabilities of answers and prompts, against transformers and `Engine.score`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moeruntime import Engine, Output, Request, SamplingParams
from moeruntime.errors import RequestError
from runtime_fixtures import load_reference, reference_logits

PROMPT = [1, 40, 41, 42, 300, 301, 302, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29]


@pytest.fixture(scope="module")
def engine(lossless_pack: Path) -> Iterator[Engine]:
    with Engine.from_pack(lossless_pack, device="cpu", max_sequences=4, max_step_tokens=8) as one:
        yield one


def ask(engine: Engine, **params: int | float) -> Output:
    (output,) = engine.generate([Request("math", PROMPT, SamplingParams(**params))])  # type: ignore[arg-type]
    return output


def test_they_are_those_of_the_reference(engine: Engine, checkpoints: dict[str, Path]) -> None:
    output = ask(engine, max_tokens=6, logprobs=3, prompt_logprobs=2, temperature=0.7, seed=1)
    ids = [*PROMPT, *output.token_ids]
    expected_TV = reference_logits(load_reference(checkpoints["math"]), ids).log_softmax(dim=-1)
    found = [*output.prompt_logprobs, *output.logprobs]
    assert len(output.prompt_logprobs) == len(PROMPT) - 1
    assert len(found) == len(ids) - 1
    for at, (one, token) in enumerate(zip(found, ids[1:], strict=True)):
        count = 2 if at < len(PROMPT) - 1 else 3
        assert one.logprob == pytest.approx(float(expected_TV[at, token]), abs=1e-3)
        top = expected_TV[at].topk(count)
        assert [value for _, value in one.top] == pytest.approx(top.values.tolist(), abs=1e-3)


def test_a_cached_beginning_is_looked_at_again(engine: Engine) -> None:
    ask(engine, max_tokens=1)
    first = ask(engine, max_tokens=1, prompt_logprobs=0)
    (score,) = engine.score("math", [PROMPT])
    assert [one.logprob for one in first.prompt_logprobs] == pytest.approx(score.tolist(), abs=1e-4)


def test_who_does_not_ask_gets_none_and_the_same_tokens(engine: Engine) -> None:
    params = SamplingParams(max_tokens=4, temperature=1.0, seed=3)
    asking = SamplingParams(max_tokens=4, temperature=1.0, seed=3, logprobs=0)
    plain, asked = engine.generate(
        [Request("math", PROMPT, params), Request("math", PROMPT, asking)]
    )
    assert plain.token_ids == asked.token_ids
    assert plain.logprobs == () and len(asked.logprobs) == 4
    assert all(one.top == () for one in asked.logprobs)
    assert torch.tensor([one.logprob for one in asked.logprobs]).le(0).all()


@pytest.mark.parametrize("value", [-1, 21, True])
def test_a_senseless_number_is_refused(value: int) -> None:
    with pytest.raises(RequestError, match="logprobs"):
        SamplingParams(logprobs=value)

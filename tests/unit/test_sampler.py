"""The sampler against its definition, written out in plain Python floats."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from moeruntime.request import SamplingParams
from moeruntime.sampler import sample
from moeruntime.sequence import Sequence

VOCAB = 50


def random_logits(num_rows: int, seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def distribution(logits: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """Token -> probability: temperature, then the top k, then the nucleus among all tokens."""
    values = [value / params.temperature for value in logits.tolist()]
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    total = math.fsum(weights)
    probs = [weight / total for weight in weights]
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])
    kept, mass = [], 0.0
    for token in ranked:
        if kept and (mass >= params.top_p or len(kept) == params.top_k):
            break
        kept.append(token)
        mass += probs[token]
    return {token: probs[token] / mass for token in kept}


def test_greedy_takes_the_largest_logit() -> None:
    logits_NV = random_logits(40, 0)
    tokens = sample(logits_NV, [SamplingParams()] * 40, [0.5] * 40)
    assert tokens == [int(np.argmax(row)) for row in logits_NV.numpy()]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.3),
        SamplingParams(temperature=5.0),
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_k=7),
        SamplingParams(temperature=1.0, top_k=1000),
        SamplingParams(temperature=1.0, top_p=0.1),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=1.0, top_p=1e-9),
        SamplingParams(temperature=2.0, top_p=0.8, top_k=5),
        SamplingParams(temperature=2.0, top_p=0.3, top_k=20),
    ],
    ids=repr,
)
def test_each_token_takes_its_share_of_the_uniform_numbers(params: SamplingParams) -> None:
    steps = 4000
    uniforms = [step / steps for step in range(steps)]
    for seed in range(3):
        logits_V = random_logits(1, seed)[0]
        tokens = sample(logits_V.expand(steps, -1), [params] * steps, uniforms)
        expected = distribution(logits_V, params)
        assert set(tokens) <= set(expected)
        for token, prob in expected.items():
            assert abs(tokens.count(token) / steps - prob) <= 1.01 / steps


def test_the_edges_of_the_unit_interval_stay_inside_what_is_kept() -> None:
    params = SamplingParams(temperature=1.0, top_k=3)
    logits_NV = random_logits(1, 5).expand(2, -1)
    first, last = sample(logits_NV, [params] * 2, [0.0, math.nextafter(1.0, 0.0)])
    kept = list(distribution(logits_NV[0], params))
    assert (first, last) == (kept[0], kept[-1])


@pytest.mark.parametrize(("top_p", "num_kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (1, 4)])
def test_the_nucleus_ends_where_it_reaches_top_p_exactly(top_p: float, num_kept: int) -> None:
    steps = 100
    params = SamplingParams(temperature=1.0, top_p=top_p)
    uniforms = [step / steps for step in range(steps)]
    tokens = sample(torch.zeros(steps, 4), [params] * steps, uniforms)
    assert len(set(tokens)) == num_kept


def test_tokens_of_no_probability_are_never_chosen() -> None:
    logits_NV = torch.full((200, VOCAB), -math.inf)
    logits_NV[:, 3] = 0.0
    logits_NV[:, 9] = 0.0
    uniforms = [step / 199 * (1 - 1e-12) for step in range(200)]
    assert set(sample(logits_NV, [SamplingParams(temperature=1.0)] * 200, uniforms)) == {3, 9}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature: float) -> None:
    logits_NV = random_logits(30, 1) * 30
    params = SamplingParams(temperature=temperature)
    uniforms = [row / 30 for row in range(30)]
    assert sample(logits_NV, [params] * 30, uniforms) == logits_NV.argmax(dim=-1).tolist()


def test_a_huge_vocabulary_reaches_its_last_token() -> None:
    vocab = 150_000
    logits_NV = torch.zeros(1, vocab)
    logits_NV[0] -= torch.arange(vocab) * 1e-9  # a strict order, nearly uniform
    tokens = sample(logits_NV, [SamplingParams(temperature=1.0)], [math.nextafter(1.0, 0.0)])
    assert tokens[0] > vocab - 10


def test_what_a_row_gets_does_not_depend_on_the_other_rows() -> None:
    rng = random.Random(0)
    choices = [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.5, top_k=4),
        SamplingParams(temperature=1.0, top_p=0.6),
    ]
    logits_NV = random_logits(64, 2)
    params = [rng.choice(choices) for _ in range(64)]
    uniforms = [rng.random() for _ in range(64)]
    together = sample(logits_NV, params, uniforms)
    alone = [
        sample(logits_NV[row : row + 1], [params[row]], [uniforms[row]])[0] for row in range(64)
    ]
    assert together == alone


def test_the_input_is_left_alone() -> None:
    logits_NV = random_logits(4, 3)
    before = logits_NV.clone()
    sample(logits_NV, [SamplingParams(temperature=1.0, top_p=0.5)] * 4, [0.1] * 4)
    assert torch.equal(logits_NV, before)


def test_a_sequences_own_random_numbers_give_the_right_frequencies() -> None:
    params = SamplingParams(temperature=1.3, top_k=8, seed=1234)
    seq = Sequence(0, "a", [1], params)
    logits_V = random_logits(1, 4)[0]
    num_draws = 20_000
    uniforms = [seq.uniform() for _ in range(num_draws)]
    tokens = sample(logits_V.expand(num_draws, -1), [params] * num_draws, uniforms)
    expected = distribution(logits_V, params)
    assert set(tokens) == set(expected)
    observed = [tokens.count(token) for token in expected]
    assert chisquare(observed, [p * num_draws for p in expected.values()]).pvalue > 1e-3


def test_seeds_repeat_and_differ() -> None:
    def numbers(seed: int) -> list[float]:
        seq = Sequence(0, "a", [1], SamplingParams(temperature=1.0, seed=seed))
        return [seq.uniform() for _ in range(20)]

    assert numbers(7) == numbers(7)
    assert numbers(7) != numbers(8)
    assert all(0 <= number < 1 for number in numbers(9))

from __future__ import annotations

from typing import Any

import pytest

from moeruntime.errors import RequestError
from moeruntime.request import MAX_STOP_STRINGS, SamplingParams
from moeruntime.sequence import Sequence


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"max_tokens": 1},
        {"max_tokens": 2**31 - 1},
        {"temperature": 0},
        {"temperature": 100.0},
        {"temperature": 1e-30},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"top_k": 0},
        {"top_k": 2**31 - 1},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"stop": ("x",) * MAX_STOP_STRINGS},
    ],
)
def test_values_in_range_are_taken(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert {key: getattr(params, key) for key in values} == values


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, outside 1"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 2**63}, "max_tokens is 9223372036854775808"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5, not an integer"),
        ({"max_tokens": True}, "max_tokens is True, not an integer"),
        ({"max_tokens": "5"}, "max_tokens is '5', not an integer"),
        ({"max_tokens": None}, "max_tokens is None, not an integer"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": 101.0}, "temperature is 101"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot', not a number"),
        ({"top_p": 0}, "top_p is 0, which leaves no token"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.5}, "top_k is 2.5, not an integer"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": "lucky"}, "seed is 'lucky', not an integer"),
        ({"stop": ("",)}, "none of them empty"),
        ({"stop": ("a", "")}, "none of them empty"),
        ({"stop": ("x",) * (MAX_STOP_STRINGS + 1)}, "up to 16 strings"),
        ({"stop": "one string"}, "a tuple of"),
        ({"stop": (3,)}, "a tuple of"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    message = str(caught.value)
    assert complaint in message
    assert "\n" not in message


def test_pending_tokens_are_the_prompt_and_then_what_was_chosen() -> None:
    prompt = list(range(10, 20))
    seq = Sequence(0, "a", prompt, SamplingParams(max_tokens=5))
    ran: list[int] = []
    for count in (3, 3, 4):
        ran += seq.pending_ids(count)
        seq.num_cached += count
    assert ran == prompt
    assert seq.num_pending == 0
    for token in (90, 91):
        seq.output_ids.append(token)
        assert seq.num_pending == 1
        assert seq.pending_ids(1) == [token]
        seq.num_cached += 1
    # A sequence that has to start over runs through both.
    seq.num_cached = 8
    assert seq.pending_ids(4) == [18, 19, 90, 91]

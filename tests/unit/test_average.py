from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconsolidate.merging import MERGE_RULES
from moeconsolidate.merging.average import average

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_identical_members_come_out_bit_by_bit(dtype: torch.dtype, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(-6e4, 6e4, width=16), min_size=1, max_size=20))
    count = data.draw(st.integers(1, 17))
    row_P = (torch.tensor(values) * 1.1).to(dtype)
    row_P[0] = -0.0
    merged_P = average([row_P.clone() for _ in range(count)], out=torch.empty_like(row_P))
    assert torch.equal(merged_P.view(torch.uint8), row_P.view(torch.uint8))


def test_one_member_is_not_even_copied() -> None:
    row_P = torch.randn(5)
    assert average([row_P], out=torch.empty(5)) is row_P


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_in_float32_in_order(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(1000).to(dtype) for _ in range(5)]
    wide = [row.to(torch.float64 if dtype == torch.float32 else torch.float32) for row in rows]
    expected = ((((wide[0] + wide[1]) + wide[2]) + wide[3]) + wide[4]) / 5
    out = torch.empty(1000, dtype=dtype)
    assert torch.equal(average(rows, out=out), expected.to(dtype))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(1000).bfloat16() for _ in range(3)]
    whole = average(rows, out=torch.empty_like(rows[0])).clone()
    monkeypatch.setitem(average.__globals__, "CHUNK_ELEMENTS", 7)
    assert torch.equal(average(rows, out=torch.empty_like(rows[0])), whole)


def test_the_registry_knows_it() -> None:
    assert MERGE_RULES["average"] is average

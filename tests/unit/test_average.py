from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import TINY_CONFIG
from moeconsolidate.merging import MERGE_RULES, SlotContext, base
from moeconsolidate.merging import average as rule
from moeconsolidate.plan import ExpertRef
from moeruntime.errors import CheckpointError
from moeruntime.families import FAMILIES
from moeruntime.strict_json import Fields

CONFIG = FAMILIES["mixtral"].parse_config(Fields(TINY_CONFIG, "config.json", CheckpointError))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def average(rows: list[Tensor]) -> Tensor:
    refs = tuple(ExpertRef(idx, 0) for idx in range(len(rows)))
    context = SlotContext(0, 0, refs, CONFIG)
    return MERGE_RULES["average"](rows, context, out=torch.empty_like(rows[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_identical_members_come_out_bit_by_bit(dtype: torch.dtype, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(-6e4, 6e4, width=16), min_size=1, max_size=20))
    count = data.draw(st.integers(1, 17))
    row_P = (torch.tensor(values) * 1.1).to(dtype)
    row_P[0] = -0.0
    merged_P = average([row_P.clone() for _ in range(count)])
    assert torch.equal(merged_P.view(torch.uint8), row_P.view(torch.uint8))


def test_one_member_is_not_even_copied() -> None:
    row_P = torch.randn(5)
    assert average([row_P]) is row_P


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_in_float32_in_order(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(1000).to(dtype) for _ in range(5)]
    wide = [row.to(torch.float64 if dtype == torch.float32 else torch.float32) for row in rows]
    expected = ((((wide[0] + wide[1]) + wide[2]) + wide[3]) + wide[4]) / 5
    assert torch.equal(average(rows), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_do_not_show(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(1000).to(dtype) for _ in range(3)]
    whole = average(rows)
    for module in (base, rule):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 7)
    assert torch.equal(average(rows), whole)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_bfloat16s_of_any_size_average_as_torch_has_it(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    bits = torch.randint(0, 2**16, (count, 70_001), generator=generator, dtype=torch.int32)
    rows = bits.to(torch.int16).view(torch.bfloat16)
    rows = torch.where(rows.isfinite(), rows, -0.0)
    sums = rows[0].float()
    for row_P in rows[1:]:
        sums += row_P.float()
    expected = (sums / count).bfloat16()
    assert torch.equal(average(list(rows)).view(torch.int16), expected.view(torch.int16))

"""That the interpreter, as tests use it, finds what it is there to find."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from interpreter import Launches
from kernel_fixtures import ON_CPU, randn
from moeruntime.kernels.chain import begin_chained, chained

pytestmark = pytest.mark.parametrize("device", [pytest.param("cpu", marks=ON_CPU)], indirect=True)


@triton.jit
def _copy(source, out, num, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    begin_chained(CHAINED)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(source + place, place < num, other=0), place < num)


@triton.jit
def _copy_early(source, out, num, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + place, place < num, other=0)
    begin_chained(CHAINED)
    tl.store(out + place, value, place < num)


@triton.jit
def _write_early(out, CHAINED: tl.constexpr):
    tl.store(out, 1)
    begin_chained(CHAINED)


@triton.jit
def _sum_behind(address, out, BLOCK: tl.constexpr):
    source = tl.load(address).to(tl.pointer_type(tl.int32))
    tl.store(out, tl.sum(tl.load(source + tl.arange(0, BLOCK))))


@triton.jit
def _ranks(counter, out):
    tl.store(out + tl.program_id(0), tl.atomic_add(counter, 1))


@triton.jit
def _round(source, out, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(source + place).to(tl.bfloat16))


def test_a_kernel_may_touch_what_it_was_given_and_no_more(device: torch.device) -> None:
    numbers = torch.arange(20, dtype=torch.int32)
    out = torch.full((20,), -1, dtype=torch.int32)
    _copy[(2,)](numbers[4:16], out[4:16], 12, BLOCK=8, CHAINED=False)
    assert out.tolist() == [*[-1] * 4, *range(4, 16), *[-1] * 4]
    with pytest.raises(InterpreterError, match="1 of 5 addresses are nobody's"):
        _copy[(2,)](numbers[4:16], out[4:17], 13, BLOCK=8, CHAINED=False)
    with pytest.raises(InterpreterError, match="1 of 5 addresses are nobody's"):
        _copy[(2,)](numbers[4:17], out[4:16], 13, BLOCK=8, CHAINED=False)


def test_what_is_found_by_its_address_has_to_be_allowed(
    device: torch.device, launches: Launches
) -> None:
    numbers, out = torch.arange(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    address = torch.tensor([numbers.data_ptr()])
    with pytest.raises(InterpreterError, match="8 of 8 addresses are nobody's"):
        _sum_behind[(1,)](address, out, BLOCK=8)
    launches.allow([numbers])
    _sum_behind[(1,)](address, out, BLOCK=8)
    assert out.tolist() == [28]


def test_a_kernel_launched_early_has_to_wait_for_what_the_one_before_it_writes(
    device: torch.device,
) -> None:
    numbers = torch.arange(12, dtype=torch.int32)
    out, last = torch.empty_like(numbers), torch.empty_like(numbers)
    _copy[(2,)](numbers, out, 12, BLOCK=8, **chained(device))
    with pytest.raises(InterpreterError, match="read before what came before is complete"):
        _copy_early[(2,)](out, last, 12, BLOCK=8, **chained(device))
    _copy[(2,)](numbers, out, 12, BLOCK=8, **chained(device))
    _copy_early[(2,)](numbers, last, 12, BLOCK=8, **chained(device))
    _copy_early[(2,)](out, last, 12, BLOCK=8, **chained(device))
    assert torch.equal(last, numbers)


def test_a_kernel_launched_early_has_to_wait_before_it_writes(device: torch.device) -> None:
    out = torch.empty(1, dtype=torch.int32)
    with pytest.raises(InterpreterError, match="written before what came before is complete"):
        _write_early[(1,)](out, **chained(device))


def test_programs_run_in_no_order_that_one_could_count_on(device: torch.device) -> None:
    orders = set()
    for _ in range(5):
        counter, out = torch.zeros(1, dtype=torch.int32), torch.empty(9, dtype=torch.int32)
        _ranks[(9,)](counter, out)
        assert sorted(out.tolist()) == list(range(9))
        orders.add(tuple(out.tolist()))
    assert len(orders) == 5


def test_bfloat16_is_rounded_to_the_nearest(device: torch.device) -> None:
    numbers = randn(64, seed=1, device=device)
    numbers[:3] = torch.tensor([float("inf"), 1 + 2**-8, 1 + 3 * 2**-8])
    out = torch.empty(64, dtype=torch.bfloat16)
    _round[(1,)](numbers, out, BLOCK=64)
    assert torch.equal(out, numbers.bfloat16())

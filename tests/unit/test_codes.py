"""Nested codes against their definition: the words on disk, the formula, the bytes."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeruntime.codes import (
    NestedCode,
    PrivateCode,
    decode,
    nested_bytes,
    pack_planes,
    plane_bytes,
    plane_shapes,
    scale_columns,
    unpack_planes,
)

ALL_CODES = [PrivateCode(bits, step) for bits in range(6) for step in range(129)]
VALID_CODES = [code for code in ALL_CODES if code.valid()]


def random_codes(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (rows, columns), generator=generator).to(torch.uint8)


# -- planes ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32))
def test_planes_give_back_the_codes(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    planes = pack_planes(codes, bits)
    assert {width: tuple(plane.shape) for width, plane in planes.items()} == plane_shapes(
        rows, columns, bits
    )
    assert all(plane.dtype == torch.uint8 for plane in planes.values())
    assert sum(plane.nbytes for plane in planes.values()) == plane_bytes(rows, columns, bits)
    assert torch.equal(unpack_planes(planes, columns), codes.int())
    backwards = dict(reversed(planes.items()))  # the order of a mapping means nothing
    assert torch.equal(unpack_planes(backwards, columns), codes.int())


def naive_planes(row: list[int], bits: int) -> dict[int, list[int]]:
    """docs/format.md in plain integers: widths 4, 2, 1 from the high bits; column p * J + j."""
    planes = {}
    above = bits
    for width in (4, 2, 1):
        if not bits & width:
            continue
        above -= width
        num_bytes = -(-len(row) * width // 8)
        plane = [0] * num_bytes
        for column, code in enumerate(row):
            field, byte = divmod(column, num_bytes)
            plane[byte] += ((code >> above) % 2**width) << (field * width)
        planes[width] = plane
    return planes


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(0, 127), min_size=1, max_size=50))
def test_every_bit_is_where_the_format_says(bits: int, numbers: list[int]) -> None:
    row = [number % 2**bits for number in numbers]
    planes = pack_planes(torch.tensor([row], dtype=torch.uint8), bits)
    assert {width: plane[0].tolist() for width, plane in planes.items()} == naive_planes(row, bits)


def test_a_row_by_hand() -> None:
    """Five codes of three bits: high bits in two bytes of 2-bit fields, low bits in one."""
    planes = pack_planes(torch.tensor([[5, 0, 7, 2, 1]], dtype=torch.uint8), 3)
    assert planes[2].tolist() == [[0b00_11_10, 0b01_00]]  # columns 4, 2, 0 and 3, 1
    assert planes[1].tolist() == [[0b1_0_1_0_1]]
    # Five of four bits take three bytes: field 0 of the bytes is columns 0, 1, 2.
    planes = pack_planes(torch.arange(1, 6, dtype=torch.uint8)[None], 4)
    assert planes[4].tolist() == [[0x41, 0x52, 0x03]]


def test_no_bits_have_no_planes() -> None:
    assert pack_planes(torch.zeros(3, 5, dtype=torch.uint8), 0) == {}
    assert plane_shapes(3, 5, 0) == {}
    assert plane_bytes(3, 5, 0) == 0


# -- the formula -----------------------------------------------------------------------------------


def exact(h: int, a: int, r: int, shared: int, private: int, scale: float) -> Fraction:
    """docs/format.md in fractions."""
    level = Fraction(shared * 2 ** (7 - h) + a * private)
    offset = Fraction((2**h - 1) * 2 ** (7 - h) + a * (2**r - 1), 2)
    return Fraction(scale) * (level - offset)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 6),
    st.sampled_from(VALID_CODES),
    st.integers(8, 24),
    st.integers(1, 40),
    st.integers(0, 2**32),
)
def test_decode_is_exact(h: int, private: PrivateCode, group: int, columns: int, seed: int) -> None:
    code = NestedCode(h, group)
    shared = random_codes(2, columns, h, seed)
    fine = random_codes(2, columns, private.bits, seed + 1) if private.bits else None
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(2, scale_columns(columns, group), generator=generator).bfloat16()
    decoded = decode(shared, scale, code, fine, private)
    assert (decoded.dtype, decoded.shape) == (torch.float32, (2, columns))
    for row in range(2):
        for column in range(columns):
            low = int(fine[row, column]) if fine is not None else 0
            wanted = exact(
                h, private.step, private.bits, int(shared[row, column]), low,
                float(scale[row, column // group]),
            )  # fmt: skip
            assert Fraction(float(decoded[row, column])) == wanted


@pytest.mark.parametrize("h", range(2, 7))
def test_levels_are_symmetric_and_fit_a_byte(h: int) -> None:
    for private in VALID_CODES:
        top = (2**h - 1) * 2 ** (7 - h) + private.step * (2**private.bits - 1)
        assert top <= 255
    shared = torch.arange(2**h)[None]
    one = torch.ones(1, 1).bfloat16()
    levels = decode(shared, one, NestedCode(h, 64), None, PrivateCode(0, 0))
    assert torch.equal(levels, -levels.flip(1))
    steps = levels.diff()
    assert bool((steps == 2 ** (7 - h)).all())


def test_no_private_bits_are_the_shared_matrix() -> None:
    """A member of no private bits has what a member at the middle of its private bits would."""
    shared = random_codes(3, 10, 4, 0)
    scale = torch.rand(3, 1).bfloat16()
    plain = decode(shared, scale, NestedCode(4, 16), None, PrivateCode(0, 0))
    pairs = [
        decode(shared, scale, NestedCode(4, 16), torch.full((3, 10), low), PrivateCode(2, 3))
        for low in (1, 2)
    ]
    assert torch.equal((pairs[0] + pairs[1]) / 2, plain)


# -- what can be stored, and what it takes ---------------------------------------------------------


@pytest.mark.parametrize(("bits", "most"), [(1, 127), (2, 42), (3, 18), (4, 8)], ids=str)
def test_steps_that_can_be_stored(bits: int, most: int) -> None:
    assert [code.step for code in VALID_CODES if code.bits == bits] == list(range(1, most + 1))


def test_codes_that_cannot_be_stored() -> None:
    assert PrivateCode(0, 0).valid()
    for bits, step in ((0, 1), (1, 0), (4, 0), (5, 1), (5, 4), (-1, 0), (-1, 1), (2, -1), (1, -4)):
        assert not PrivateCode(bits, step).valid(), (bits, step)


@pytest.mark.parametrize("columns", [1, 15, 16, 24, 33, 96])
@pytest.mark.parametrize("bits", [(), (0,), (1, 0), (3, 2, 4)])
def test_bytes_are_those_of_the_tensors(columns: int, bits: tuple[int, ...]) -> None:
    rows, code = 6, NestedCode(4, 32)
    tensors = [*pack_planes(random_codes(rows, columns, 4, 0), 4).values()]
    tensors.append(torch.ones(rows, scale_columns(columns, 32)).bfloat16())
    for number in bits:
        tensors += pack_planes(random_codes(rows, columns, number, 0), number).values()
    private = [PrivateCode(number, 1 if number else 0) for number in bits]
    # One byte says what the shared code is, and one what each member's is.
    assert nested_bytes(rows, columns, code, private) == (
        sum(tensor.nbytes for tensor in tensors) + 1 + len(bits)
    )


@pytest.mark.parametrize(("columns", "scales"), [(1, 1), (31, 1), (32, 1), (33, 2), (96, 3)])
def test_the_last_scale_may_cover_less(columns: int, scales: int) -> None:
    assert scale_columns(columns, 32) == scales

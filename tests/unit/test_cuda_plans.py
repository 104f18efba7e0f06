"""What Python decides for the CUDA kernels: tiles, fast faces, lists, sizes of batches."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

from moeruntime.codes import NestedCode, PrivateCode
from moeruntime.kernels.attention_cuts import (
    MOST_SPLITS,
    SPAN_TOKENS,
    SPLIT_PROGRAMS,
    DecodeCut,
    SpanCut,
)
from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.face_parts import MAX_FACES, Cut, is_fast
from moeruntime.kernels.shapes import tile_rows
from moeruntime.kernels.strips import lay_in_strips
from moeruntime.models.step_buffers import BATCH_SIZES, StepShapes, batch_sizes

NO_TRITON = """
import sys
sys.modules["triton"] = None  # whoever imports it fails
import moeruntime
from moeruntime import Engine, Request, SamplingParams
from moeruntime.synthetic import SyntheticSource
for code in ("bf16", "4+2"):
    with Engine(SyntheticSource("mixtral-tiny", code=code), device="cpu") as engine:
        (output,) = engine.generate([Request("v0", [1, 2, 3], SamplingParams(max_tokens=3))])
        assert len(output.token_ids) == 3
print("ran")
"""


def test_an_engine_on_a_cpu_needs_no_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TRITON], capture_output=True, text=True, check=False
    )
    assert done.stdout == "ran\n", done.stderr


# -- cuts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_faces", [8, 32])
@pytest.mark.parametrize("hopper", [False, True])
def test_a_step_is_cut_by_how_many_tokens_a_face_has(num_faces: int, hopper: bool) -> None:
    cuts = [Cut.of(2 * batch, num_faces, hopper=hopper) for batch in BATCH_SIZES]
    assert not cuts[0].tiled, "one token"
    assert cuts[-1].tiled == hopper
    assert (cuts[-1].kernel == "wide") == (hopper and num_faces == 8)
    for cut, batch in zip(cuts, BATCH_SIZES, strict=True):
        assert (
            cut.tiles in {"few": (1, 2, 4), "many": (4, 8, 12), "wide": (4, 8, 12, 16)}[cut.kernel]
        )
        assert cut.tokens * 8 >= 2 * batch / num_faces, "a face has few programs"


def test_faces_of_a_slot_meet_where_that_was_measured_to_be_faster() -> None:
    def cut(batch: int, faces_a_slot: float, *, hopper: bool = True) -> Cut:
        faces = int(8 * faces_a_slot)
        return Cut.of(2 * batch, faces, hopper=hopper, faces_a_slot=faces_a_slot)

    meetings = [cut(batch, 4.0) for batch in (1, 8, 32, 64, 128, 256)]
    assert [one.meet > 0 for one in meetings] == [0, 0, 1, 1, 1, 0]
    assert [one.tiles for one in meetings if one.kernel == "many"] == [4, 4, 4, 8]
    assert cut(32, 4.0).kernel == "many", "who is alone in a slot goes to the other kernel"
    assert cut(32, 1.0).meet == 0
    assert cut(32, 4.0, hopper=False).meet == 0


# -- strips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [128, 384])
@pytest.mark.parametrize("is_gate_up", [False, True])
def test_strips_have_every_byte_where_kernels_look_for_it(is_gate_up: bool, num_bytes: int) -> None:
    num_rows = 64
    plane = torch.randint(256, (2, num_rows, num_bytes), dtype=torch.uint8)
    laid = plane.clone()
    lay_in_strips(laid, is_gate_up=is_gate_up)
    for matrix, strips in zip(plane, laid, strict=True):
        flat = strips.flatten()
        for row in range(num_rows):
            place = row
            if is_gate_up:
                neuron, is_up = row % 32, row // 32
                place = neuron // 16 * 32 + is_up * 16 + neuron % 16
            for byte in range(num_bytes):
                at = byte % 128 ^ (64 if place % 2 else 0)
                assert flat[(byte // 128 * num_rows + place) * 128 + at] == matrix[row, byte]


# -- tiles -----------------------------------------------------------------------------------------


def test_tiles_cover_each_run_once_and_never_two_slots() -> None:
    numbers = random.Random(1)
    for _ in range(50):
        groups, at = [], 0
        for slot in numbers.sample(range(8), numbers.randint(1, 5)):
            count = numbers.randint(1, 70)
            groups.append((slot, at, at + count))
            at += count
        slots, starts, stops = tile_rows(groups, 32, num_tiles=40)
        assert len(slots) == len(starts) == len(stops) == 40
        owner: dict[int, int] = {}
        for slot, start, stop in zip(slots, starts, stops, strict=True):
            assert (slot < 0) == (start == stop)
            assert stop - start <= 32
            for token in range(start, stop):
                assert token not in owner
                owner[token] = slot
        assert owner == {
            token: slot for slot, start, stop in groups for token in range(start, stop)
        }


# -- attention -------------------------------------------------------------------------------------


def test_few_decodes_are_cut_along_their_contexts() -> None:
    for num_kv_heads in (1, 2, 8, 32):
        cuts = {size: DecodeCut.of(size, num_kv_heads) for size in BATCH_SIZES}
        for size, cut in cuts.items():
            programs = size * num_kv_heads * cut.splits
            assert cut.splits == 1 or programs <= SPLIT_PROGRAMS
            assert cut.splits in (1, MOST_SPLITS) or 2 * programs > SPLIT_PROGRAMS
            assert cut.early == (programs <= 2 * SPLIT_PROGRAMS)


@pytest.mark.parametrize("window", [None, 100, 5000])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 8), (12, 1), (32, 32)])
def test_pieces_are_of_all_tokens_that_are_not_alone(
    num_heads: int, num_kv_heads: int, window: int | None
) -> None:
    cut = SpanCut.of(num_heads, num_kv_heads, window)
    assert cut.heads * cut.runs * num_kv_heads >= num_heads
    numbers = random.Random(2)
    split = 0
    for _ in range(200):
        spans, at = [], 0
        for _ in range(numbers.randint(1, 20)):
            count = numbers.choice([1, 1, 2, 32, 33, numbers.randint(1, 200)])
            spans.append((at, at + count, count + numbers.choice([0, 9000, 40000])))
            at += count
        pieces = cut.pieces(spans)
        assert len(pieces) <= cut.most_pieces(at)
        found: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for sequence, first, part, parts in pieces:
            found.setdefault((sequence, first), []).append((part, parts))
        assert list(found) == [
            (idx, first)
            for idx, (start, stop, _) in enumerate(spans)
            for first in range(0, stop - start if stop - start > 1 else 0, SPAN_TOKENS)
        ]
        for parts_of in found.values():
            assert parts_of == [(part, len(parts_of)) for part in range(len(parts_of))]
        if len(pieces) > len(found):
            assert len(pieces) * cut.programs <= SPLIT_PROGRAMS, "the scratch has no more"
            split += 1
    assert (split > 0) == (window != 100)


def test_only_long_contexts_of_few_programs_are_split() -> None:
    cut = SpanCut.of(32, 8, None)
    assert cut.pieces([(0, 20, 20)]) == [(0, 0, 0, 1)]
    assert cut.pieces([(0, 20, 520)]) == [(0, 0, 0, 2), (0, 0, 1, 2)]
    assert len(cut.pieces([(0, 20, 5000)])) == 19
    assert len(cut.pieces([(0, 20, 32000)])) == SPLIT_PROGRAMS // 8
    assert len(cut.pieces([(0, 1024, 8000)])) == 32, "they fill a device as they are"


# -- faces -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "shape", "private", "expected"),
    [
        (NestedCode(4, 128), (28672, 4096), [PrivateCode(2, 2)], True),
        (NestedCode(4, 128), (4096, 14336), [PrivateCode(0, 0), PrivateCode(4, 1)], True),
        (NestedCode(4, 128), (4096, 14336), [PrivateCode(3, 2)], True),
        (NestedCode(4, 128), (4096, 14336), [PrivateCode(2, 2), PrivateCode(3, 18)], True),
        (NestedCode(3, 128), (4096, 14336), [PrivateCode(2, 2)], False),
        (NestedCode(4, 32), (4096, 14336), [PrivateCode(2, 2)], False),
        (NestedCode(4, 128), (4096, 1024), [PrivateCode(2, 2)], True),
        (NestedCode(4, 128), (4096, 1024 + 512), [PrivateCode(2, 2)], False),
        (NestedCode(4, 128), (4096 + 16, 14336), [PrivateCode(2, 2)], False),
    ],
)
def test_the_fast_kernel_takes_what_it_tiles(
    code: NestedCode, shape: tuple[int, int], private: list[PrivateCode], expected: bool
) -> None:
    assert is_fast(code, shape, private) is expected


def test_a_layer_of_more_faces_than_the_kernel_lists_is_not_fast() -> None:
    code, shape = NestedCode(4, 128), (4096, 14336)
    assert is_fast(code, shape, [PrivateCode(2, 2)] * MAX_FACES)
    assert not is_fast(code, shape, [PrivateCode(2, 2)] * (MAX_FACES + 1))


def test_lists_name_each_pair_once_under_its_face() -> None:
    generator = torch.Generator().manual_seed(5)
    faces_TK = torch.rand(37, 11, generator=generator).topk(2, dim=-1).indices
    lists = FaceLists.of(faces_TK, torch.rand(37, 2, generator=generator), 11)
    assert lists.counts_LF.shape == (1, 16)
    for face in range(16):
        count = int(lists.counts_LF[0, face])
        expected = (faces_TK.flatten() == face).nonzero()[:, 0].tolist()
        assert count == len(expected)
        if face < 11:
            assert sorted(lists.pairs_LFC[0, face, :count].tolist()) == expected


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [1, 2, 3, 31, 32, 33, 200, 256])
def test_every_batch_has_a_size_to_be_filled_up_to(max_rows: int) -> None:
    sizes = batch_sizes(max_rows)
    assert sizes == list(BATCH_SIZES[: len(sizes)])
    assert sizes[-1] >= max_rows
    assert len(sizes) == 1 or sizes[-2] < max_rows


@pytest.mark.parametrize("exact", [False, True])
def test_a_step_of_any_size_is_cut_somehow(exact: bool) -> None:
    for size in BATCH_SIZES:
        shapes = StepShapes.of(size, exact=exact)
        assert shapes.qkv.tokens == shapes.o.tokens == shapes.head.tokens, "they share their tiles"
        assert shapes.head.parts == shapes.qkv.parts == 1
        for one in (shapes.qkv, shapes.o, shapes.gate_up, shapes.down, shapes.head):
            rows = one.rows * (2 if one is shapes.gate_up else 1)
            ahead = (one.stages - 1) * one.step * (rows + one.tokens) * (4 if exact else 2)
            assert ahead <= 99 * 1024, "which is what a program has on devices with the least"

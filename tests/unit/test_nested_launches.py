"""What `nested_fast` asks of a device: that there is room for everything a kernel writes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeruntime.kernels import nested_fast
from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.face_parts import TILE, UNIT_WORDS, WIDE_TILE, ByteRows, Cut, FacePart
from moeruntime.kernels.nested_programs import few_bytes

HIDDEN, INNER, SLOTS, TOP_K = 1024, 2048, 8, 2
MAX_SHARED_BYTES, LEAST_SHARED_BYTES = 227 * 1024, 99 * 1024
"""That a program may have on a Hopper device, and on the smallest of those that have bfloat16."""

CPU = torch.device("cpu")
CUTS = [
    None,
    *(Cut(tiles, turns) for tiles, turns in ((1, 8), (2, 4), (4, 1))),
    *(Cut(tiles, kernel="many") for tiles in (4, 8, 12)),
    *(Cut(tiles, kernel="wide") for tiles in (4, 8, 12, 16)),
    Cut(4, kernel="many", meet=32),
]
Launch = tuple[str, tuple[int, int, int], Sequence[Any], int]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Those that a Hopper device would have been given."""
    made: list[Launch] = []

    def compile_kernel(path: Path, name: str, defines: object) -> Callable[..., None]:
        def launch(
            grid: tuple[int, int, int], threads: int, arguments: Sequence[Any], *, shared_bytes: int
        ) -> None:
            made.append((name, grid, arguments, shared_bytes))

        return launch

    monkeypatch.setattr(nested_fast, "compile_kernel", compile_kernel)
    monkeypatch.setattr(nested_fast, "_device", lambda device: (132, True))
    return made


def make_part(variants: int, num_planes: int, *, wide: bool, is_gate_up: bool) -> FacePart:
    rows, columns = (2 * INNER, HIDDEN) if is_gate_up else (HIDDEN, INNER)
    return FacePart(
        rows, columns, 4, 128, {4: torch.zeros(SLOTS, rows, 1, dtype=torch.uint8)},
        torch.zeros(SLOTS, rows, columns // 128),
        torch.zeros(SLOTS * variants, 6, dtype=torch.int64),
        num_planes, wide, is_gate_up, in_strips=True,
    )  # fmt: skip


def most_that_pairs_form(num_pairs: int, num_faces: int, tokens: int) -> int:
    """Runs of up to `tokens` of a face: the most is where all have one, and one has the rest."""
    return min(num_pairs, num_faces) + max(0, num_pairs - num_faces) // tokens


@pytest.mark.parametrize(("variants", "num_planes", "wide"), [(1, 1, 0), (4, 1, 0), (3, 2, 1)])
@pytest.mark.parametrize("num_tokens", [1, 3, 24, 128])
def test_a_step_has_room(
    launches: list[Launch], variants: int, num_planes: int, wide: int, num_tokens: int
) -> None:
    num_faces, num_pairs = SLOTS * variants, num_tokens * TOP_K
    lists = FaceLists(1, num_faces, num_tokens, TOP_K, CPU)
    scratch = ByteRows(lists, num_tokens, HIDDEN, INNER)
    for cut, is_gate_up in itertools.product(CUTS, (True, False)):
        part = make_part(variants, num_planes, wide=bool(wide), is_gate_up=is_gate_up)
        launches.clear()
        if is_gate_up:
            x, out = torch.zeros(num_tokens, HIDDEN), torch.zeros(num_pairs, INNER)
            nested_fast.gate_up(x, part, lists, 0, scratch, out_MI=out, cut=cut)
        else:
            num_parts = nested_fast.down_parts(part, lists, num_pairs) if cut is None else 1
            x, out = torch.zeros(num_pairs, INNER), torch.zeros(num_pairs, num_parts, HIDDEN)
            nested_fast.down(x, part, lists, 0, scratch, out_MSH=out, cut=cut)
        (name, (blocks, _, _), arguments, _), *others = launches
        assert name == "halves"
        num_rows, groups_a_row = arguments[3:5]
        assert 4 * (blocks - 1) >= num_rows * groups_a_row, "all are made integers"
        tiled = any(one[0] != "nested" for one in others)
        if tiled:
            tile = WIDE_TILE if others[0][0] == "nested_wide" else TILE
            assert num_rows >= tile * most_that_pairs_form(num_pairs, num_faces, tile)
            num_rows += TILE  # of a tile that is empty, and copied all the same
        assert scratch.values.numel() >= 2 * num_rows * part.num_columns
        assert scratch.groups.numel() >= 2 * num_rows * groups_a_row
        num_units = arguments[11]
        assert num_units >= most_that_pairs_form(num_pairs, num_faces, arguments[12])
        assert scratch.units.numel() >= 2 * UNIT_WORDS * num_units
        for _, grid, _, shared_bytes in others:
            assert 0 < shared_bytes <= MAX_SHARED_BYTES
            assert min(grid) >= 1


@pytest.mark.parametrize("num_pairs", [1, 8, 32, 512])
def test_other_devices_have_room_for_the_kernel_of_few_tokens(
    monkeypatch: pytest.MonkeyPatch, num_pairs: int
) -> None:
    """At the widths of Mixtral-8x7B, with private codes of any bits."""
    monkeypatch.setattr(nested_fast, "_device", lambda device: (108, False))
    for rows, columns, is_gate_up in ((28672, 4096, True), (4096, 14336, False)):
        small = make_part(4, 2, wide=True, is_gate_up=is_gate_up)
        part = replace(small, num_rows=rows, num_columns=columns)
        lists = FaceLists(1, len(part.faces_F6), num_pairs, 1, CPU)
        cut = nested_fast.chosen_cut(part, lists, num_pairs)
        assert cut.kernel == "few" and not cut.meet
        assert few_bytes(part, cut) <= LEAST_SHARED_BYTES


def test_down_comes_in_parts_where_its_programs_leave_the_last_round_half_empty(
    launches: list[Launch],
) -> None:
    part = make_part(4, 1, wide=False, is_gate_up=False)  # 32 programs a pair, 528 at once
    lists = FaceLists(1, len(part.faces_F6), 64, 1, CPU)
    parts = {pairs: nested_fast.down_parts(part, lists, pairs) for pairs in (2, 8, 10, 16, 20, 64)}
    assert parts == {2: 2, 8: 2, 10: 1, 16: 1, 20: 2, 64: 1}, "64 have the kernel of many tokens"


@pytest.mark.parametrize(
    ("num_pairs", "differ"), [(60, True), (200, True), (800, True), (1600, False)]
)
def test_a_step_of_one_variant_is_cut_as_in_a_pack_of_one(
    monkeypatch: pytest.MonkeyPatch, num_pairs: int, differ: bool
) -> None:
    monkeypatch.setattr(nested_fast, "_device", lambda device: (132, True))

    def cut(num_variants: int, most_wanted: int | None) -> Cut:
        part = make_part(num_variants, 1, wide=False, is_gate_up=True)
        num_faces = len(part.faces_F6)
        lists = FaceLists(1, num_faces, num_pairs, 1, CPU, most_wanted=most_wanted)
        return nested_fast.chosen_cut(part, lists, num_pairs)

    assert cut(4, SLOTS) == cut(1, None)
    assert cut(4, 4 * SLOTS) == cut(4, None)
    assert (cut(4, None) != cut(4, SLOTS)) == differ


def test_what_is_compiled_ahead_is_what_steps_want(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[tuple[Path, object]] = []
    ahead: list[tuple[Path, object]] = []

    def compile_kernel(path: Path, name: str, defines: object) -> Callable[..., None]:
        wanted.append((path, defines))
        return lambda *arguments, shared_bytes: None

    monkeypatch.setattr(nested_fast, "compile_kernel", compile_kernel)
    monkeypatch.setattr(nested_fast, "compile_images", ahead.extend)
    monkeypatch.setattr(nested_fast, "_device", lambda device: (132, True))
    num_faces, most = 4 * SLOTS, 128
    lists = FaceLists(1, num_faces, most, TOP_K, CPU)
    scratch = ByteRows(lists, most, HIDDEN, INNER)
    parts = [make_part(4, 1, wide=False, is_gate_up=is_gate_up) for is_gate_up in (True, False)]
    steps = [(lists, tokens * TOP_K) for tokens in (1, 8, 40, most)]
    nested_fast.compile_ahead(parts, steps)
    for _, num_pairs in steps:
        x, inner = torch.zeros(num_pairs // TOP_K, HIDDEN), torch.zeros(num_pairs, INNER)
        nested_fast.gate_up(x, parts[0], lists, 0, scratch, out_MI=inner)
        num_parts = nested_fast.down_parts(parts[1], lists, num_pairs)
        out = torch.zeros(num_pairs, num_parts, HIDDEN)
        nested_fast.down(inner, parts[1], lists, 0, scratch, out_MSH=out)
    assert len(ahead) == len(set(ahead)) and set(ahead) == set(wanted)

"""Faces of nested codes, decoded as the definition says: bit by bit what it gives, rounded."""

from __future__ import annotations

import pytest
import torch

from kernel_fixtures import Allow
from moeruntime.codes import NestedCode, PrivateCode
from moeruntime.kernels import nested
from nested_parts import Faces, random_part
from nested_steps import ALL_FACES, CODE

SHAPES = {"cpu": (40, 128), "cuda": (300, 384)}
# Hidden and intermediate size: one strip of what has fewest bits, and on a GPU a real model's.
SIZES = {"cpu": (1024, 1024), "cuda": (2048, 4096)}
ROWS_ON_CPU = 64
"""Of a matrix in strips, where all of them would take too long."""


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("shared_bits", [2, 3, 4, 5, 6])
def test_faces_are_decoded_as_the_definition_says(
    device: torch.device, allow: Allow, shared_bits: int, bits: int
) -> None:
    if shared_bits + bits > 7:
        return
    (rows, columns), code = SHAPES[device.type], NestedCode(shared_bits, 128)
    one = PrivateCode(bits, 1) if bits else PrivateCode(0, 0)
    faces: Faces = ((0, one), (1, one), (0, one))
    made = random_part(
        rows, columns, faces, code, seed=shared_bits * 8 + bits, device=device, is_gate_up=True
    )
    allow(made.alive)
    out = torch.full((2, rows, columns), torch.nan, device=device, dtype=torch.bfloat16)
    counts = torch.tensor([1, 1, 0], dtype=torch.int32, device=device)
    nested.decode_faces(made.part, 1, counts, out_FRC=out)
    assert torch.equal(out[0], made.decoded_FRC[1].bfloat16())
    assert out[1].isnan().all(), "nobody wants it"


@pytest.mark.parametrize("is_gate_up", [True, False])
@pytest.mark.parametrize("faces", ["mixed", "threes"])
def test_faces_in_strips_are_decoded_like_others(
    device: torch.device, allow: Allow, faces: str, is_gate_up: bool
) -> None:
    hidden, inner = SIZES[device.type]
    rows, columns = (2 * inner, hidden) if is_gate_up else (hidden, inner)
    if device.type == "cpu":
        rows = ROWS_ON_CPU
    made = random_part(
        rows, columns, ALL_FACES[faces], CODE, seed=1 + is_gate_up, device=device,
        is_gate_up=is_gate_up, in_strips=True,
    )  # fmt: skip
    allow(made.alive)
    out_FRC = torch.full_like(made.decoded_FRC, torch.nan, dtype=torch.bfloat16)
    counts_F = torch.ones(len(out_FRC), dtype=torch.int32, device=device)
    nested.decode_faces(made.part, 0, counts_F, out_FRC=out_FRC)
    assert torch.equal(out_FRC, made.decoded_FRC.bfloat16())

"""Experts of a decode step, as weights and as codes, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_fixtures import DTYPES, Allow, assert_close, randn
from moeruntime.codes import NestedCode, PrivateCode
from moeruntime.kernels import experts, nested
from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.shapes import Shape
from nested_parts import Faces, random_part

EXACT, ROUNDED = DTYPES
TOKENS, TOP_K, IDLE = 52, 2, 1


def make_lists(num_faces: int, device: torch.device) -> tuple[FaceLists, Tensor, Tensor]:
    """Lists of tokens of which all but the last, who is idle, go to face 1 and to another.

    One face gets more tokens than fit a tile, some get none; faces and weights [T, K] beside them.
    """
    generator = torch.Generator().manual_seed(num_faces)
    other_T = torch.randint(2, num_faces, (TOKENS,), generator=generator)
    faces_TK = torch.stack([other_T, torch.ones_like(other_T)], dim=1)
    weights_TK = torch.rand(TOKENS, TOP_K, generator=generator)
    lists = FaceLists(2, num_faces, TOKENS + IDLE, TOP_K, device)
    lists.weights_TK.fill_(torch.nan)
    lists.weights_TK[:TOKENS] = weights_TK.to(device)
    one = FaceLists.of(faces_TK, weights_TK, num_faces)
    lists.counts_LF[1] = one.counts_LF[0].to(device)
    lists.pairs_LFC[1, :, : one.pairs_LFC.shape[2]] = one.pairs_LFC[0].to(device)
    return lists, faces_TK, weights_TK


def check(
    pools: tuple[Tensor, Tensor],
    found: tuple[Tensor, Tensor],
    inputs: Tensor,
    chosen: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> None:
    """Compare what gate_up and down left with products by weights [F, R, C]; idle rows are NaN."""
    gate_up_FRC, down_FRC = (pool.double().cpu() for pool in pools)
    inner_MI, out_MSH = (one.double().cpu() for one in found)
    x_TH, (faces_TK, weights_TK) = inputs.double().cpu(), chosen
    expected_inner, expected_out = torch.full_like(inner_MI, torch.nan), out_MSH.sum(1)
    expected_out.fill_(torch.nan)
    for pair, face in enumerate(faces_TK.flatten().tolist()):
        gate, up = (gate_up_FRC[face] @ x_TH[pair // TOP_K]).chunk(2)
        expected_inner[pair] = F.silu(gate) * up
        weight = float(weights_TK.flatten()[pair])
        expected_out[pair] = down_FRC[face] @ inner_MI[pair] * weight
    assert_close(inner_MI, expected_inner, dtype)
    assert_close(out_MSH.sum(1), expected_out, torch.float32)


@pytest.mark.parametrize(
    ("hidden", "inner", "shape", "dtype"),
    [
        (64, 32, Shape(rows=32, step=32, tokens=16), EXACT),
        (64, 32, Shape(rows=32, step=16, tokens=32, parts=2), EXACT),
        (40, 56, Shape(rows=32, step=32, tokens=16), EXACT),
        (72, 40, Shape(rows=32, step=16, tokens=16, parts=2), EXACT),
        (72, 40, Shape(rows=64, step=16, tokens=16, parts=4), EXACT),  # one of them is empty
        (64, 32, Shape(rows=32, step=32, tokens=16), ROUNDED),
        (72, 40, Shape(rows=32, step=16, tokens=16, parts=2), ROUNDED),
    ],
)
def test_every_pair_meets_its_face(
    device: torch.device, hidden: int, inner: int, shape: Shape, dtype: torch.dtype
) -> None:
    num_faces = 6
    lists, *chosen = make_lists(num_faces, device)
    x = randn(TOKENS + IDLE, hidden, seed=1, device=device, dtype=dtype)
    arena = randn(num_faces, 3 * inner, hidden, seed=2, device=device, dtype=dtype)
    gate_up = arena[:, : 2 * inner]
    down = randn(num_faces, hidden, inner, seed=3, device=device, dtype=dtype)
    num_pairs = (TOKENS + IDLE) * TOP_K
    inner_MI = torch.full((num_pairs, inner), torch.nan, dtype=dtype, device=device)
    out_MSH = torch.full((num_pairs, shape.parts, hidden), torch.nan, device=device)
    experts.gate_up(x, gate_up, lists, 1, shape, out_MI=inner_MI)
    experts.down(inner_MI, down, lists, 1, shape, out_MSH=out_MSH)
    check((gate_up, down), (inner_MI, out_MSH), x, (chosen[0], chosen[1]), dtype)


@pytest.mark.parametrize(
    ("shared_bits", "private", "dtype"),
    [
        (2, ((1, 6), (4, 1), (3, 2)), EXACT),
        (3, ((0, 0), (4, 1), (2, 3)), EXACT),
        (4, ((1, 4), (2, 2), (3, 1)), EXACT),
        (5, ((2, 1), (0, 0), (1, 2)), EXACT),
        (6, ((1, 1), (0, 0), (1, 1)), EXACT),
        (4, ((2, 3), (0, 0), (1, 6)), ROUNDED),
    ],
)
def test_every_pair_meets_its_face_of_codes(
    device: torch.device,
    allow: Allow,
    shared_bits: int,
    private: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
) -> None:
    # Columns that fill no byte, no group and no step.
    hidden, inner, shape = 75, 42, Shape(rows=32, step=32, tokens=16)
    slots = (0, 1, 1)
    faces: Faces = tuple(
        (slot, PrivateCode(*code)) for slot, code in zip(slots, private, strict=True)
    )
    code = NestedCode(shared_bits, 32)
    parts = [
        random_part(2 * inner, hidden, faces, code, seed=4, device=device, is_gate_up=True),
        random_part(hidden, inner, faces, code, seed=5, device=device, is_gate_up=False),
    ]
    for part in parts:
        allow(part.alive)
    lists, *chosen = make_lists(len(faces), device)
    x = randn(TOKENS + IDLE, hidden, seed=6, device=device, dtype=dtype)
    num_pairs = (TOKENS + IDLE) * TOP_K
    inner_MI = torch.full((num_pairs, inner), torch.nan, dtype=dtype, device=device)
    out_MSH = torch.full((num_pairs, 1, hidden), torch.nan, device=device)
    nested.gate_up(x, parts[0].part, lists, 1, shape, out_MI=inner_MI)
    nested.down(inner_MI, parts[1].part, lists, 1, shape, out_MSH=out_MSH)
    # Kernels multiply by levels in the dtype of their inputs.
    decoded = (parts[0].decoded_FRC.to(dtype), parts[1].decoded_FRC.to(dtype))
    check(decoded, (inner_MI, out_MSH), x, (chosen[0], chosen[1]), dtype)

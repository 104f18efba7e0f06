"""Norms, routing and lists of faces, against the same in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_fixtures import DTYPES, assert_close, randn
from moeruntime.kernels import norms
from moeruntime.kernels.face_lists import FaceLists

EPS = 1e-2
SLOTS = [0, 2, 2, 1, 0]
TOKENS = len(SLOTS)


def normed(x_TH: Tensor, weight_RH: Tensor, slot_T: Tensor) -> Tensor:
    x_TH = x_TH.double()
    scale_T1 = (x_TH.square().mean(dim=1, keepdim=True) + EPS).rsqrt()
    return x_TH * scale_T1 * weight_RH.double()[slot_T]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_parts", [0, 1, 3])
@pytest.mark.parametrize("hidden", [64, 100])
def test_parts_are_added_and_each_token_has_its_own_variants_norm(
    device: torch.device, hidden: int, num_parts: int, dtype: torch.dtype
) -> None:
    slot_T = torch.tensor(SLOTS, device=device)
    residual = randn(TOKENS, hidden, seed=1, device=device)
    weight = randn(3, 2 * hidden, seed=2, device=device, dtype=dtype)[:, :hidden]
    parts = randn(TOKENS, num_parts, hidden, seed=3, device=device) if num_parts else None
    expected = residual.double() if parts is None else residual.double() + parts.double().sum(1)
    out = torch.full((TOKENS, hidden), torch.nan, dtype=dtype, device=device)
    norms.add_norm(residual, parts, weight, slot_T, EPS, out_TH=out)
    assert_close(residual, expected, torch.float32)
    assert_close(out, normed(expected, weight, slot_T), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_may_lie_anywhere_and_count_by_their_shares(
    device: torch.device, dtype: torch.dtype
) -> None:
    hidden, slot_T = 72, torch.tensor(SLOTS, device=device)
    residual = randn(TOKENS, hidden, seed=4, device=device)
    weight = randn(hidden, seed=5, device=device, dtype=dtype).expand(3, hidden)
    rows = randn(11, hidden, seed=6, device=device, dtype=dtype)
    row_TP = torch.randint(11, (TOKENS, 2), generator=torch.Generator().manual_seed(7)).to(device)
    share_TP = randn(TOKENS, 2, seed=8, device=device)
    expected = residual.double() + (rows.double()[row_TP] * share_TP[..., None]).sum(1)
    out = torch.full((TOKENS, hidden), torch.nan, dtype=dtype, device=device)
    norms.add_norm(
        residual, rows, weight, slot_T, EPS, out_TH=out, rows_TP=row_TP, shares_TP=share_TP
    )
    assert_close(residual, expected, torch.float32)
    assert_close(out, normed(expected, weight, slot_T), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (3, 1), (12, 3)])
def test_each_token_is_put_on_the_lists_of_the_faces_it_is_routed_to(
    device: torch.device, num_experts: int, top_k: int, dtype: torch.dtype
) -> None:
    hidden, num_faces, num_parts = 72, 9, 2
    slot_T = torch.tensor(SLOTS, device=device)
    variants = [0, 2, -1, 1, 0]  # one that only fills the batch up
    residual = randn(TOKENS, hidden, seed=11, device=device)
    parts = randn(TOKENS, num_parts, hidden, seed=12, device=device)
    weight = randn(3, hidden, seed=13, device=device, dtype=dtype)
    router = randn(3, num_experts + 1, hidden, seed=14, device=device, dtype=dtype)[:, :num_experts]
    generator = torch.Generator().manual_seed(15)
    faces_VLE = torch.randint(num_faces, (3, 2, num_experts), generator=generator)
    lists = FaceLists(2, num_faces, TOKENS, top_k, device)
    lists.pairs_LFC.fill_(-1)
    lists.weights_TK.fill_(torch.nan)
    expected = residual.double() + parts.double().sum(1)
    out = torch.full((TOKENS, hidden), torch.nan, dtype=dtype, device=device)
    norms.route(
        residual,
        parts,
        weight,
        router,
        slot_T,
        torch.tensor(variants, device=device),
        faces_VLE.to(device)[:, 1],
        lists,
        1,
        EPS,
        out_TH=out,
    )
    assert_close(residual, expected, torch.float32)
    assert_close(out, normed(expected, weight, slot_T), dtype)
    logits_TE = torch.einsum("teh,th->te", router.double()[slot_T], out.double())
    chosen = logits_TE.topk(top_k)
    assert_close(lists.weights_TK, chosen.values.softmax(-1), torch.float32)
    wanted: list[list[int]] = [[] for _ in range(num_faces)]
    for token, variant in enumerate(variants):
        for choice, expert in enumerate(chosen.indices[token].tolist()):
            if variant >= 0:
                wanted[int(faces_VLE[variant, 1, expert])].append(token * top_k + choice)
    counts = lists.counts_LF.tolist()
    assert counts[0] == [0] * len(counts[0]), "the other layer's"
    assert counts[1] == [len(pairs) for pairs in wanted] + [0] * (len(counts[1]) - num_faces)
    for face, pairs in enumerate(wanted):
        assert sorted(lists.pairs_LFC[1, face, : len(pairs)].tolist()) == pairs
        assert (lists.pairs_LFC[1, face, len(pairs) :] == -1).all()
    assert (lists.pairs_LFC[0] == -1).all()


@pytest.mark.parametrize("num_tokens", [7, 1100])
def test_lists_follow_each_other_as_rows_of_a_product(
    device: torch.device, num_tokens: int
) -> None:
    top_k, num_faces, first_row = 2, 5, 40
    generator = torch.Generator().manual_seed(num_tokens)
    faces_TK = torch.rand(num_tokens, num_faces, generator=generator).topk(top_k).indices.to(device)
    lists = FaceLists.of(faces_TK, torch.rand(num_tokens, top_k).to(device), num_faces)
    some = range(1, 4)
    row_TK = torch.full((num_tokens, top_k), -1, device=device)
    ends, token_M = norms.in_order(lists, 0, some, first_row=first_row, row_TK=row_TK)
    counts = [int((faces_TK == face).sum()) for face in some]
    assert ends.tolist() == [sum(counts[: idx + 1]) for idx in range(len(some))]
    place_of = dict(zip(some, (0, *ends.tolist()), strict=False))
    rows: set[int] = set()
    for token, faces in enumerate(faces_TK.tolist()):
        for choice, face in enumerate(faces):
            row = int(row_TK[token, choice])
            if face not in some:
                assert row == -1
                continue
            place = row - first_row
            assert place_of[face] <= place < place_of[face] + counts[face - some.start]
            assert token_M[place] == token
            rows.add(row)
    assert len(rows) == sum(counts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (7, 20), (300, 40)])
def test_the_first_half_of_a_row_gates_the_second(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    both = randn(shape[0], 2 * shape[1], seed=21, device=device, dtype=dtype)
    gate, up = both.double().chunk(2, dim=1)
    assert_close(norms.gated(both), F.silu(gate) * up, dtype)

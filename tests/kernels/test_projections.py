"""Dense products of mixed variants, against float64."""

from __future__ import annotations

import pytest
import torch

from kernel_fixtures import DTYPES, assert_close, randn
from moeruntime.kernels import projections
from moeruntime.kernels.shapes import Shape, tile_rows

GROUPS = [(2, 0, 5), (0, 5, 6), (1, 6, 29)]
TOKENS, IDLE = 29, 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_in", "num_out", "shape", "shared"),
    [
        (64, 64, Shape(rows=32, step=32, tokens=16), False),
        (64, 64, Shape(rows=32, step=16, tokens=32, parts=2), True),
        (72, 40, Shape(rows=32, step=32, tokens=16), True),
        (72, 40, Shape(rows=16, step=16, tokens=16, parts=3), False),
        (40, 72, Shape(rows=32, step=64, tokens=16), False),
    ],
)
def test_each_token_meets_its_own_variants_weights(
    device: torch.device,
    num_in: int,
    num_out: int,
    shape: Shape,
    shared: bool,
    dtype: torch.dtype,
) -> None:
    x = randn(TOKENS + IDLE, num_in, seed=1, device=device, dtype=dtype)
    weight = randn(3, 2 * num_out, num_in, seed=2, device=device, dtype=dtype)[:, :num_out]
    if shared:
        weight = weight[1].expand(3, num_out, num_in)
    tiles = torch.tensor(tile_rows(GROUPS, shape.tokens, 5), dtype=torch.int32, device=device)
    # One part is what comes next; several wait in float32 to be added up.
    kind = dtype if shape.parts == 1 else torch.float32
    out = torch.full((TOKENS + IDLE, shape.parts, num_out), torch.nan, dtype=kind, device=device)
    projections.project(x, weight, tiles, shape, out=out)
    expected = torch.full((TOKENS + IDLE, num_out), torch.nan, dtype=torch.float64)
    for slot, start, stop in GROUPS:
        expected[start:stop] = x[start:stop].double().cpu() @ weight[slot].double().cpu().T
    assert_close(out.double().sum(1), expected, kind)

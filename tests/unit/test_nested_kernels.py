"""The kernels of nested codes against the same arithmetic in numpy, weight by weight as it reads.

Every operation is float32 in both, in the same order, so results are equal and not just close.

Legend: N slots, V members, R rows, C columns, B columns of a batch.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moeconsolidate.allocation import OPTIONS
from moeconsolidate.encoding import COARSE_FACTORS, FINE_OFFSETS, encode
from moeconsolidate.kernels import columns, jit
from moeconsolidate.kernels.jit import kernel
from moeconsolidate.kernels.planes import pack_plane
from moeruntime.codes import NestedCode, PrivateCode, pack_planes
from moeruntime.codes.planes import MAX_BITS

Array = NDArray[np.float32]
F = np.float32
TINIEST = np.finfo(np.float32).tiny


def best_codes(
    target_VP: Array, weight_VP: Array, code: NestedCode, ones: list[PrivateCode]
) -> tuple[Array, Array, Array, Array]:
    """H, Ls, levels and errors of P places: the better of the shared codes around the mean."""
    step = F(2 ** (7 - code.shared_bits))
    most = F(2**code.shared_bits - 1)
    total, mean = np.zeros_like(weight_VP[0]), np.zeros_like(weight_VP[0])
    for target, weight in zip(target_VP, weight_VP, strict=True):
        total, mean = total + weight, mean + target * weight
    below = np.floor(mean / np.maximum(total, TINIEST) / step + most / F(2))
    tried = []
    for unbounded in (below, below + F(1)):
        shared = np.clip(unbounded, F(0), most)
        base, error = (shared - most / F(2)) * step, np.zeros_like(shared)
        private, levels = np.empty_like(target_VP), np.empty_like(target_VP)
        for v, one in enumerate(ones):
            middle = F(2**one.bits - 1) / F(2)
            wanted = (target_VP[v] - base) / F(max(one.step, 1)) + middle
            private[v] = np.clip(np.rint(wanted), F(0), F(2**one.bits - 1))
            levels[v] = base + F(one.step) * (private[v] - middle)
            error = error + (target_VP[v] - levels[v]) ** 2 * weight_VP[v]
        tried.append((shared, private, levels, error))
    low, high = tried
    better = high[3] < low[3]
    shared, private, levels, error = (
        np.where(better, ours, theirs) for ours, theirs in zip(high, low, strict=True)
    )
    return shared, private, levels, error


def as_bfloat16(value: Any) -> Array:
    return torch.as_tensor(value).bfloat16().float().numpy()


def sum_in_lanes(errors: Array) -> np.float32:
    """64 partial sums, folded to 16 and then added up; what is left over goes before these."""
    blocks, rest = errors[: len(errors) // 64 * 64], errors[len(errors) // 64 * 64 :]
    lanes = np.zeros(64, np.float32)
    for block in blocks.reshape(-1, 64):
        lanes += block
    for block in rest[: len(rest) // 16 * 16].reshape(-1, 16):
        lanes[:16] += block
    folded = ((lanes[:16] + lanes[16:32]) + lanes[32:48]) + lanes[48:]
    total = F(0)
    for error in (*rest[len(rest) // 16 * 16 :], *folded):
        total += error
    return total


def best_scale(
    weights_VC: Array, weight_VC: Array, code: NestedCode, ones: list[PrivateCode]
) -> np.float32:
    """Of the factors that are tried on one group, the first with the least error."""
    unit = max(np.abs(weights_VC).max(), F(2.0**-100)) / F(64)
    best, least = F(1), F(np.inf)

    def attempt(factor: np.float32) -> None:
        nonlocal best, least
        scale = F(as_bfloat16(unit * factor))
        errors = np.zeros(code.group, np.float32)
        found = best_codes(weights_VC / scale, weight_VC, code, ones)[3]
        errors[: len(found)] = found
        error = sum_in_lanes(errors) * (scale * scale)
        if error < least:
            best, least = factor, error

    for factor in COARSE_FACTORS:
        attempt(F(factor))
    centre = best
    for offset in FINE_OFFSETS:
        attempt(centre + F(offset))
    return F(as_bfloat16(unit * best))


def members(num_members: int, rows: int, columns: int, seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    common = random.standard_normal((1, rows, columns)) ** 3
    own = random.standard_normal((num_members, rows, columns))
    return (common / 10 + own / 20).astype(np.float32)


NONE, DEFAULT = PrivateCode(0, 0), PrivateCode(3, 2)
CASES = [
    (NestedCode(4, 128), [DEFAULT, DEFAULT], 256),
    (NestedCode(4, 32), [DEFAULT, DEFAULT], 100),
    (NestedCode(4, 128), [PrivateCode(2, 3), NONE, DEFAULT], 1300),
    (NestedCode(2, 32), [PrivateCode(1, 6)], 64),
    (NestedCode(6, 128), [PrivateCode(4, 1), PrivateCode(1, 5)], 130),
    (NestedCode(3, 8), [DEFAULT, PrivateCode(4, 8)], 24),
    *((NestedCode(4, 32), [one, one], 64) for one in OPTIONS),
]


@pytest.mark.parametrize(("code", "ones", "columns"), CASES, ids=str)
def test_rounding_is_what_numpy_makes_of_it(
    code: NestedCode, ones: list[PrivateCode], columns: int
) -> None:
    weights_VRC = members(len(ones), 3, columns)
    codes = encode(torch.from_numpy(weights_VRC)[None], code, [ones])
    for r in range(3):
        for g, start in enumerate(range(0, columns, code.group)):
            group = slice(start, start + code.group)
            weights_VC = weights_VRC[:, r, group]
            even = np.ones_like(weights_VC)
            scale = best_scale(weights_VC, even, code, ones)
            assert float(codes.scale_NRG[0, r, g]) == float(scale)
            shared, private, levels, _ = best_codes(weights_VC / scale, even, code, ones)
            assert np.array_equal(codes.shared_NRC[0, r, group].numpy(), shared)
            assert np.array_equal(codes.private_NVRC[0, :, r, group].numpy(), private)
            assert np.array_equal(codes.weights_NVRC[0, :, r, group].numpy(), levels * scale)


def columns_to_choose(
    num_members: int, columns: int, rows: int
) -> tuple[Array, Array, Array, Array]:
    """Wanted [V, B, R], scales [B, R], a positive matrix [V, B, B], importance [V, R]."""
    random = np.random.default_rng(1)
    wanted = members(num_members, columns, rows, seed=2)
    scale = as_bfloat16((0.01 + random.random((columns, rows)) / 50).astype(np.float32))
    root = random.standard_normal((num_members, columns, columns)).astype(np.float32)
    matrix = root @ root.transpose(0, 2, 1) + np.eye(columns, dtype=np.float32)
    outputs = (random.random((num_members, rows)) + 0.01).astype(np.float32)
    return wanted, scale, matrix, outputs


COLUMN_CODE, COLUMN_ONES = NestedCode(4, 128), [DEFAULT, PrivateCode(2, 3), NONE]
STEPS = np.array([[one.step for one in COLUMN_ONES]], np.float32)
MOST = np.array([[2**one.bits - 1 for one in COLUMN_ONES]], np.float32)


def test_errors_are_fed_forward_as_in_numpy() -> None:
    wanted, scale, matrix, outputs = columns_to_choose(3, 5, 37)
    feedback = np.linalg.cholesky(matrix).transpose(0, 2, 1).copy()
    pivots = np.stack([np.diagonal(one) for one in feedback])
    left, found = wanted[None].copy(), [np.empty_like(wanted)[None] for _ in range(3)]
    shared = np.empty_like(scale)[None]
    levels, private, errors = found
    columns.feed_columns(
        left, scale[None], pivots[None], feedback[None], outputs[None], STEPS, MOST, 4, 8,
        levels, shared, private, errors,
    )  # fmt: skip
    now = wanted.copy()
    for c in range(5):
        square = pivots[:, c, None] * pivots[:, c, None]
        chosen = best_codes(now[:, c] / scale[c], outputs / square, COLUMN_CODE, COLUMN_ONES)
        assert np.array_equal(shared[0, c], chosen[0])
        assert np.array_equal(private[0, :, c], chosen[1])
        assert np.array_equal(levels[0, :, c], chosen[2])
        error = (now[:, c] - chosen[2] * scale[c]) / pivots[:, c, None]
        assert np.array_equal(errors[0, :, c], error)
        for later in range(c + 1, 5):
            now[:, later] -= feedback[:, c, later, None] * error


def test_descent_moves_as_in_numpy() -> None:
    wanted, scale, matrix, outputs = columns_to_choose(3, 5, 37)
    shared, private, levels, _ = best_codes(
        (wanted / scale).reshape(3, -1),
        np.ones((3, wanted[0].size), np.float32),
        COLUMN_CODE,
        COLUMN_ONES,
    )
    shared = shared.reshape(1, 5, 37)
    private, levels = private.reshape(1, 3, 5, 37), levels.reshape(1, 3, 5, 37)
    slope = np.einsum("vbc,vcr->vbr", matrix, levels[0] * scale - wanted).astype(np.float32)
    now, expected_slope = levels[0].copy(), slope.copy()
    slope, moves = slope[None].copy(), np.empty_like(levels)
    before = levels.copy()
    columns.descend_columns(
        slope, scale[None], matrix[None], outputs[None], STEPS, MOST, 4, 8,
        levels, shared, private, moves,
    )  # fmt: skip
    for c in range(5):
        curvature = matrix[:, c, c, None]
        here = now[:, c] * scale[c]
        chosen = best_codes(
            (here - expected_slope[:, c] / curvature) / scale[c],
            outputs * curvature,
            COLUMN_CODE,
            COLUMN_ONES,
        )
        assert np.array_equal(shared[0, c], chosen[0])
        assert np.array_equal(private[0, :, c], chosen[1])
        assert np.array_equal(levels[0, :, c], chosen[2])
        move = chosen[2] * scale[c] - here
        assert np.array_equal(moves[0, :, c], move)
        expected_slope += matrix[:, :, c, None] * move[:, None]
    assert np.array_equal(slope[0], expected_slope)
    assert not np.array_equal(levels, before)


@pytest.mark.parametrize("columns", [1, 7, 64, 100])
@pytest.mark.parametrize("bits", range(1, MAX_BITS + 1))
def test_planes_are_packed_as_the_runtime_defines_it(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (3, columns), dtype=torch.uint8)
    above = bits
    for width, plane in pack_planes(codes, bits).items():
        above -= width
        found = torch.full_like(plane, 255)
        pack_plane(codes.numpy(), above, width, found.numpy())
        assert torch.equal(found, plane)


# -- where machine code is kept --------------------------------------------------------------------


def double(values: Any) -> None:
    for idx in range(len(values)):
        values[idx] *= 2


def test_nowhere_to_keep_machine_code_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(jit.FunctionCache, "__init__", nowhere)
    values = np.ones(3, np.float32)
    kernel(double)(values)
    assert values.tolist() == [2, 2, 2]


@pytest.mark.parametrize("method", ["load_overload", "save_overload"])
def test_neither_is_a_disk_that_fails(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    calls = []

    def fail(*_: object) -> None:
        calls.append(method)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jit.FunctionCache, "load_overload", lambda *_: None)
    monkeypatch.setattr(jit.FunctionCache, method, fail)
    values = np.ones(3, np.float32)
    kernel(double)(values)
    assert values.tolist() == [2, 2, 2] and calls


def test_what_was_cut_short_is_compiled_again(tmp_path: Path) -> None:
    (tmp_path / "doubling.py").write_text(
        "import numpy as np\n"
        "from moeconsolidate.kernels.jit import kernel\n"
        "@kernel\n"
        "def double(values):\n"
        "    values *= 2\n"
        "values = np.ones(3)\n"
        "double(values)\n"
        "print(values.sum(), sum(double.stats.cache_hits.values()))\n"
    )
    cache = tmp_path / "cache"
    environment = {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": ":".join(sys.path)}

    def run() -> str:
        command = [sys.executable, str(tmp_path / "doubling.py")]
        return subprocess.check_output(command, env=environment, text=True).strip()

    assert [run(), run()] == ["6.0 0", "6.0 1"]
    for path in cache.rglob("*.nb?"):
        path.write_bytes(path.read_bytes()[:100])
    assert run() == "6.0 0"


def test_a_kernel_that_calls_one_that_changed_is_compiled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stamp() -> Any:
        return kernel(double)._cache._cache_file._source_stamp

    before = stamp()
    assert stamp() == before
    monkeypatch.setattr(jit, "_stamps_of_kernels", lambda: [("levels.py", 0, 0)])
    assert stamp() != before

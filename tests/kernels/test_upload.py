"""Small integers on their way to a device, and a kernel that only reads."""

from __future__ import annotations

import pytest
import torch

from moeruntime.bench import read_kernel
from moeruntime.kernels import upload
from moeruntime.kernels.spans import to_device


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_values_arrive_however_often_buffers_are_used_again(
    device: torch.device, dtype: torch.dtype
) -> None:
    uploader = upload.Uploader(device)
    sent = []
    for number in range(2 * upload.NUM_STAGES + 1):
        values = torch.arange(1 + number * 37).to(dtype) * 3 - number
        sent.append((values, uploader.send(values)))
    for values, arrived in sent:
        assert arrived.device.type == device.type
        assert torch.equal(arrived.cpu(), values)


@pytest.mark.parametrize("columns", [1, 5, upload.BLOCK, upload.BLOCK + 3])
def test_rows_go_where_they_are_wanted_and_nowhere_else(device: torch.device, columns: int) -> None:
    values = torch.arange(3 * columns, dtype=torch.int32).view(3, columns)
    target = torch.full((4, columns + 7), -1, dtype=torch.int32, device=device)
    upload.Uploader(device).send(values, target[:3, :columns])
    expected = torch.full_like(target, -1, device="cpu")
    expected[:3, :columns] = values
    assert torch.equal(target.cpu(), expected)


def test_whatever_a_step_needs_comes_to_where_it_runs(device: torch.device) -> None:
    values = torch.tensor([3, 1, 2])
    assert to_device(values, device).tolist() == [3, 1, 2]


@pytest.mark.parametrize("shape", read_kernel.SHAPES)
def test_everything_is_read_once(device: torch.device, shape: tuple[int, int, int]) -> None:
    run = shape[0] * shape[1]
    generator = torch.Generator().manual_seed(run)
    numbers = torch.randint(-1000, 1000, (2, run), generator=generator, dtype=torch.int32)
    out = torch.full((2,), -1, dtype=torch.int32, device=device)
    read_kernel.read(numbers.flatten().to(device), shape, out=out)
    assert out.tolist() == numbers.sum(1).tolist()

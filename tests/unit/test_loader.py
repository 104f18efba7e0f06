"""Every byte where it belongs, whatever the piece it travelled in; errors once and no hang."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeruntime import loader as loader_module
from moeruntime.errors import IntegrityError
from moeruntime.hostmemory import HUGE_PAGE_BYTES, HostMemory, new_tensor
from moeruntime.loader import Loader
from moeruntime.pack import MadeTensor, StoredTensor
from moeruntime.tensorfile import TensorFile, TensorFileWriter

CPU = torch.device("cpu")
# Below, at and above one piece of 64 bytes, in elements of 2 bytes.
SIZES = (1, 7, 31, 32, 33, 64, 1000)


@pytest.fixture(params=[64, 4096], autouse=True)
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "BUFFER_BYTES", request.param)


def random_tensor(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {
        f"{dtype}.{size}": random_tensor(size, dtype, size)
        for dtype in (torch.bfloat16, torch.float32)
        for size in SIZES
    }


@pytest.fixture
def file(tensors: dict[str, Tensor], tmp_path: Path) -> Iterator[TensorFile]:
    path = tmp_path / "weights.safetensors"
    with TensorFileWriter(path, [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]) as out:
        for name, tensor in tensors.items():
            out.append(name, tensor)
        out.finish()
    with TensorFile(path, IntegrityError) as opened:
        yield opened


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_tensors_follow_one_another_in_any_dtype(
    file: TensorFile, tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    rng = random.Random(0)
    wanted: list[tuple[Tensor, Tensor]] = []
    with Loader(CPU) as loader:
        for _ in range(60):
            names = rng.choices(list(tensors), k=rng.randint(1, 4))
            expected = torch.cat([tensors[name].to(dtype) for name in names])
            out = torch.full_like(expected, torch.nan)
            stored: list[StoredTensor] = [file.tensor(name) for name in names]
            made = rng.random() < 0.3
            if made:
                ones = MadeTensor(torch.bfloat16, (3, 2), lambda out: out.fill_(1.0))
                stored.append(ones)
                expected = torch.cat([expected, torch.ones(6, dtype=dtype)])
                out = torch.full_like(expected, torch.nan)
            loader.load(stored, out)
            wanted.append((out, expected))
    for out, expected in wanted:
        assert torch.equal(out, expected)


def test_what_was_given_before_finish_is_there_after_it(
    file: TensorFile, tensors: dict[str, Tensor]
) -> None:
    with Loader(CPU) as loader:
        for name, tensor in tensors.items():
            out = torch.full(tensor.shape, torch.nan, dtype=torch.float32)
            loader.load([file.tensor(name)], out)
            loader.finish()
            assert torch.equal(out, tensor.float())


def test_only_so_many_pieces_are_read_ahead(
    file: TensorFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0

    def count(waiting: int) -> None:
        nonlocal most
        most = max(most, waiting)

    with Loader(CPU) as loader:
        original = loader._threads.submit

        def submit(*arguments: object) -> object:
            count(sum(not piece.done() for piece in loader._pieces))
            return original(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(loader._threads, "submit", submit)
        outs = [torch.empty(1000, dtype=torch.float32) for _ in range(20)]
        for out in outs:
            loader.load([file.tensor("torch.bfloat16.1000")], out)
    assert 0 < most < loader_module.MAX_WAITING + loader_module.MAX_THREADS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_file_that_shrinks_is_one_clear_error(file: TensorFile, dtype: torch.dtype) -> None:
    os.truncate(file.path, file.entries["torch.bfloat16.1000"].offset + 100)
    shrunk = file.tensor("torch.bfloat16.1000")
    with pytest.raises(IntegrityError, match="shrank while it was"), Loader(CPU) as loader:
        for _ in range(100):
            loader.load([shrunk], torch.empty(1000, dtype=dtype))


def test_the_callers_own_error_ends_the_loading(file: TensorFile) -> None:
    with pytest.raises(ZeroDivisionError), Loader(CPU) as loader:
        loader.load([file.tensor("torch.float32.1000")], torch.empty(1000))
        _ = 1 / 0


def test_host_memory_is_plain_memory() -> None:
    memory = HostMemory(3 * HUGE_PAGE_BYTES + 5)
    assert (memory.data.dtype, memory.data.nbytes) == (torch.uint8, 3 * HUGE_PAGE_BYTES + 5)
    memory.data.fill_(7)
    assert int(memory.data.sum(dtype=torch.int64)) == 7 * memory.data.nbytes


@pytest.mark.parametrize("shape", [(3, 5), (1100, 1000), (0, 4)])
def test_new_tensors_have_the_shape_they_were_asked_for(shape: tuple[int, int]) -> None:
    tensor = new_tensor(shape, torch.bfloat16, CPU)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, torch.bfloat16, True)
    tensor.fill_(2.0)
    del shape
    assert bool((tensor == 2.0).all())

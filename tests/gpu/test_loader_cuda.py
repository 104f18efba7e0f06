"""Loading through the pinned ring on a side stream."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moeruntime import loader as loader_module
from moeruntime.errors import IntegrityError
from moeruntime.hostmemory import HostMemory
from moeruntime.loader import Loader
from moeruntime.tensorfile import TensorFile, TensorFileWriter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda", 0)
SLEEP_CYCLES = 200_000_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("buffer_bytes", [4096, 2**20])
def test_every_element_arrives(
    tmp_path: Path, dtype: torch.dtype, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "BUFFER_BYTES", buffer_bytes)
    path = tmp_path / "weights.safetensors"
    whole = torch.randn((9, 300, 1001), generator=torch.Generator().manual_seed(0)).bfloat16()
    with TensorFileWriter(path, [("w", torch.bfloat16, tuple(whole.shape))]) as writer:
        writer.append("w", whole)
        writer.finish()
    with TensorFile(path, IntegrityError) as file, Loader(DEVICE) as loader:
        outs = []
        for idx in range(9):
            # Memory that queued work still uses when the copy is asked for.
            old = torch.zeros((300, 1001), dtype=dtype, device=DEVICE)
            torch.cuda._sleep(SLEEP_CYCLES // 10)  # type: ignore[no-untyped-call]
            old.fill_(torch.nan)
            del old
            out = torch.empty((300, 1001), dtype=dtype, device=DEVICE)
            loader.load([file.row("w", idx)], out)
            outs.append(out)
        host = torch.empty((300, 1001), dtype=dtype)
        loader.load([file.row("w", 4)], host)
        loader.finish()
        for idx, out in enumerate(outs):
            assert torch.equal(out.cpu(), whole[idx].to(dtype)), idx
        assert torch.equal(host, whole[4].to(dtype))


def test_pinned_memory_is_pinned_and_let_go() -> None:
    for _ in range(3):
        memory = HostMemory(64 * 2**20)
        memory.pin()
        assert memory.data.is_pinned()
        memory.data.fill_(3)
        copy = memory.data.to(DEVICE, non_blocking=True)
        torch.cuda.synchronize()
        assert bool((copy == 3).all())

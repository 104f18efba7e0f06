"""Our reader and writer against the safetensors library, both ways."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeruntime.errors import CheckpointError
from moeruntime.hostmemory import HostMemory
from moeruntime.newfile import BLOCK_BYTES, PAGE_BYTES, NewFile
from moeruntime.tensorfile import DTYPES, TensorFile, TensorFileWriter

Shape = tuple[int, ...]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_bits(shape: Shape, dtype: torch.dtype) -> Tensor:
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).view(dtype).reshape(shape)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    declared = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with TensorFileWriter(path, declared) as file:
        for name, tensor in tensors.items():
            file.append(name, tensor)
        digest = file.finish()
    assert digest.num_bytes == path.stat().st_size


tensors_of_any_kind = st.dictionaries(
    st.text("abc._0", min_size=1, max_size=8).filter(lambda name: ".." not in name),
    st.tuples(
        st.lists(st.integers(0, 5), max_size=4).map(tuple), st.sampled_from(sorted(DTYPES.items()))
    ),
    max_size=6,
)


@given(tensors_of_any_kind)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_each_reads_what_the_other_writes(
    tmp_path: Path, kinds: dict[str, tuple[Shape, tuple[str, torch.dtype]]]
) -> None:
    tensors = {name: random_bits(shape, dtype) for name, (shape, (_, dtype)) in kinds.items()}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    ours.unlink(missing_ok=True)
    write(ours, tensors)
    save_file(tensors, theirs)
    read_back = load_file(ours)
    assert read_back.keys() == tensors.keys()
    with TensorFile(theirs, CheckpointError) as file:
        for name, tensor in tensors.items():
            for copy in (read_back[name], file.read(name)):
                assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
                assert bits(copy) == bits(tensor)


def test_rows_can_be_written_in_runs_and_read_one_by_one(tmp_path: Path) -> None:
    whole = random_bits((6, 2, 3), torch.bfloat16)
    path = tmp_path / "rows.safetensors"
    with TensorFileWriter(path, [("rows", whole.dtype, (6, 2, 3))]) as file:
        for start, stop in ((0, 1), (1, 4), (4, 6)):
            file.append("rows", whole[start:stop])
        file.finish()
    assert bits(load_file(path)["rows"]) == bits(whole)
    with TensorFile(path, CheckpointError) as file:
        for idx in range(6):
            row = file.row("rows", idx)
            assert (row.dtype, row.shape) == (torch.bfloat16, (2, 3))
            assert bits(row.read()) == bits(whole[idx])
        assert bits(file.tensor("rows").read()) == bits(whole)
        piece = torch.empty(10, dtype=torch.uint8)
        file.row("rows", 3).read_bytes(2, piece)
        assert bits(piece) == bits(whole[3])[2:]


def test_data_starts_on_a_page_and_bytes_repeat(tmp_path: Path) -> None:
    tensors = {"a": random_bits((3, 5), torch.float32)}
    write(tmp_path / "one", tensors)
    write(tmp_path / "two", tensors)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with TensorFile(tmp_path / "one", CheckpointError) as file:
        assert file.entries["a"].offset == 4096


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("lead", [0, 100])
def test_what_is_appended_in_pieces_of_any_size_is_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lead: int, direct: bool
) -> None:
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    sizes = [lead, BLOCK_BYTES, 3 * PAGE_BYTES, BLOCK_BYTES + 5, 1, 2 * BLOCK_BYTES - 1, 7]
    data = HostMemory(sum(sizes)).data.numpy()
    data[:] = np.random.default_rng(0).integers(0, 256, len(data), np.uint8)
    file, start = NewFile(tmp_path / "file"), 0
    for size in sizes:
        file.append(memoryview(data)[start : start + size])
        start += size
    file.finish()
    assert (tmp_path / "file").read_bytes() == data.tobytes()


def test_a_disk_that_wants_larger_pages_gets_ordinary_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, refused = NewFile(tmp_path / "file"), []

    class Picky:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def write(self, data: memoryview) -> int:
            if fcntl.fcntl(inner.fileno(), fcntl.F_GETFL) & os.O_DIRECT:
                refused.append(len(data))
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return inner.write(data) or 0

    inner = file._file
    monkeypatch.setattr(file, "_file", Picky())
    file.append(bytes(BLOCK_BYTES + 1))
    file.finish()
    assert (tmp_path / "file").read_bytes() == bytes(BLOCK_BYTES + 1)
    assert len(refused) <= 1  # none where there is no direct I/O anyway


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        TensorFileWriter(tmp_path / "there", [])


def test_changes_during_reading_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.arange(1000)}, path)
    with TensorFile(path, CheckpointError) as file:
        file.check_unchanged()
        os.truncate(path, 4000)
        with pytest.raises(CheckpointError, match="changed while"):
            file.check_unchanged()
        with pytest.raises(CheckpointError, match="shrank while"):
            file.read("a")
        path.unlink()
        with pytest.raises(CheckpointError, match="vanished while"):
            file.check_unchanged()


def header_file(path: Path, header: object, num_data_bytes: int = 0) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(num_data_bytes))
    return path


def entry(start: int, stop: int, **changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop], **changes}


@pytest.mark.parametrize(
    ("header", "num_data_bytes", "complaint"),
    [
        ({"a": entry(0, 4)}, 3, "truncated"),
        ({"a": entry(0, 4)}, 5, "stray bytes"),
        ({"a": entry(1, 4)}, 4, "leaves a hole"),
        ({"a": entry(0, 2), "b": entry(3, 4)}, 4, "leaves a hole"),
        ({"a": entry(0, 3), "b": entry(2, 4)}, 4, "overlaps"),
        ({"a": entry(0, 4, shape=[5])}, 4, "needs 5 bytes"),
        ({"a": entry(0, 4, dtype="u8")}, 4, "unknown dtype"),
        ({"a": entry(0, 4, extra=1)}, 4, "unknown field"),
        ({"a": entry(0, 4, data_offsets=[0])}, 4, "not a start and an end"),
        ({"a": entry(0, 0, shape=[0, 2**62])}, 0, "not an integer in"),
        ({"a": entry(0, 4, shape=[4] + [1] * 100)}, 4, "rank 101"),
        ({"../a": entry(0, 4)}, 4, "not allowed"),
        ({"": entry(0, 4)}, 4, "not allowed"),
        ({"__metadata__": {"a": 1}}, 0, "must be a string"),
        (b'{"a": {}, "a": {}}', 0, "duplicate key"),
        (b"[]", 0, "does not start with"),
    ],
)
def test_headers_that_lie(
    tmp_path: Path, header: object, num_data_bytes: int, complaint: str
) -> None:
    path = header_file(tmp_path / "bad.safetensors", header, num_data_bytes)
    with pytest.raises(CheckpointError) as problem:
        TensorFile(path, CheckpointError)
    assert str(problem.value).startswith(str(path))
    assert complaint in str(problem.value)


def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path: Path) -> None:
    header = json.dumps({"a": entry(0, 4)}).encode().ljust(0x0280)
    path = header_file(tmp_path / "good.safetensors", header, 4)
    assert path.read_bytes().startswith(b"\x80\x02")
    with TensorFile(path, CheckpointError) as file:
        assert file.entries.keys() == {"a"}

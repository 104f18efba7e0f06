"""Safetensors files: a strict header, positional reads, a streaming writer.

The format is eight bytes of header length, a JSON header, and the tensors' bytes without gaps.
moec reads and writes it here instead of through the safetensors library for four reasons:

* the library maps files, so one that shrinks while it is read kills the process with SIGBUS; a
  positional read ends in one clear error;
* it accepts duplicate names and unknown fields, and takes seconds over a header of 300,000 names;
* it can only write tensors that are all in memory at once, where the compiler holds one layer;
* positional reads land in any buffer: a plain tensor, a pinned ring, a row of the GPU arena.

The library stays the oracle in the tests: it must read every byte written here, and write what is
read here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import NoReturn, Self

import torch
from torch import Tensor

from moeruntime.errors import MoecError
from moeruntime.newfile import NewFile
from moeruntime.strict_json import Fields, parse_json

__all__ = [
    "FileDigest",
    "FileTensor",
    "TensorEntry",
    "TensorFile",
    "TensorFileWriter",
    "dtype_name",
]

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_TENSORS = 100_000
MAX_NAME_CHARACTERS = 512
MAX_RANK = 8
MAX_DIM = 2**48
# Tensor data starts at a multiple of this, so that direct I/O can read it into page-aligned memory.
DATA_ALIGNMENT_BYTES = 4096

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# What people really put under a .safetensors name, by how it begins.
_IMPOSTORS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (
        re.compile(rb"version https://git-lfs"),
        "a Git LFS pointer: fetch the real file with `git lfs pull`",
    ),
    (re.compile(rb"GGUF"), "a GGUF file: moec reads safetensors checkpoints"),
    (
        re.compile(rb"PK\x03\x04"),
        "a zip archive (a pickled PyTorch checkpoint?): convert it to safetensors",
    ),
    (
        re.compile(rb"\x80[\x02-\x05]"),
        "a Python pickle, which moec never opens: convert it to safetensors",
    ),
    (re.compile(rb"\s*<(!doctype|html)", re.I), "an HTML page: the download went wrong"),
)


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype, such as "BF16"."""
    return _DTYPE_NAMES[dtype]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: dtype, shape, and where its bytes lie from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of an open file, or a run of its rows, that has not been read yet."""

    file: TensorFile
    entry: TensorEntry

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def read(self) -> Tensor:
        """Read it into memory of its own."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_bytes(0, out.reshape(-1).view(torch.uint8))
        return out

    def read_bytes(self, start: int, out: Tensor) -> None:
        """Read its bytes from `start` on into contiguous uint8 CPU memory."""
        assert start + out.nbytes <= self.entry.num_bytes
        self.file.read_bytes(self.entry.offset + start, out)


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size in bytes and lower-case hexadecimal sha256 of a file."""

    num_bytes: int
    sha256: str


class TensorFile:
    """A safetensors file open for positional reads; safe to use from several threads."""

    def __init__(self, path: Path, error: type[MoecError]) -> None:
        """Open `path` and check its whole header against its size.

        Args:
            path: a regular file; FIFOs, devices and folders are refused before they are opened.
            error: raised, with one line naming the file and the field, for anything wrong.
        """
        self.path = path
        self._error = error
        if not path.exists():
            raise error(f"{path}: no such file")
        if not path.is_file():
            raise error(f"{path}: not a regular file")
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as problem:
            raise error(f"{path}: cannot be read: {problem.strerror}") from None
        try:
            self._identity = self._stat()
            self.entries: Mapping[str, TensorEntry] = self._parse_header()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back; reading afterwards is a programming error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def tensor(self, name: str) -> FileTensor:
        """A tensor, to be read later."""
        return FileTensor(self, self.entries[name])

    def row(self, name: str, row: int) -> FileTensor:
        """One row of a tensor's first dimension, to be read later."""
        entry = self.entries[name]
        num_rows, *rest = entry.shape
        assert 0 <= row < num_rows
        num_bytes = entry.num_bytes // num_rows
        return FileTensor(
            self, TensorEntry(entry.dtype, tuple(rest), entry.offset + row * num_bytes, num_bytes)
        )

    def read(self, name: str, *, out: Tensor | None = None) -> Tensor:
        """Read one whole tensor.

        Args:
            name: a key of `entries`.
            out: contiguous CPU memory of the tensor's dtype and shape to read into (pinned or not).
        """
        entry = self.entries[name]
        if out is None:
            out = torch.empty(entry.shape, dtype=entry.dtype)
        assert out.is_contiguous() and out.nbytes == entry.num_bytes
        self.read_bytes(entry.offset, out.reshape(-1).view(torch.uint8))
        return out

    def read_bytes(self, offset: int, out: Tensor) -> None:
        """Read the file's bytes from `offset` on into contiguous uint8 CPU memory."""
        assert out.is_contiguous() and out.dtype == torch.uint8 and out.device.type == "cpu"
        target = out.numpy().data
        done, num_bytes = 0, out.nbytes
        while done < num_bytes:
            try:
                got = os.preadv(self._fd, [target[done:]], offset + done)
            except OSError as problem:  # a disk or a network file system that fails
                reason = problem.strerror
                raise self._error(f"{self.path}: cannot be read: {reason}") from None
            if got == 0:
                raise self._error(f"{self.path}: shrank while it was being read")
            done += got

    def check_unchanged(self) -> None:
        """Raise if the file was replaced, rewritten or resized since it was opened."""
        try:
            on_disk = self.path.stat()
        except OSError:
            raise self._error(f"{self.path}: vanished while it was being read") from None
        now = (on_disk.st_dev, on_disk.st_ino, on_disk.st_size, on_disk.st_mtime_ns)
        if now != self._identity:
            raise self._error(f"{self.path}: changed while it was being read")

    def _stat(self) -> tuple[int, int, int, int]:
        stat = os.fstat(self._fd)
        return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def _parse_header(self) -> dict[str, TensorEntry]:
        where, file_bytes = str(self.path), self._identity[2]
        start = os.pread(self._fd, 64, 0)
        if len(start) < 8:
            self._refuse(start, f"{file_bytes} bytes is too short for a safetensors file")
        header_bytes = int.from_bytes(start[:8], "little")
        if header_bytes > file_bytes - 8:
            self._refuse(
                start, f"header length {header_bytes} exceeds the file's {file_bytes} bytes"
            )
        if not 2 <= header_bytes <= MAX_HEADER_BYTES:
            self._refuse(start, f"header length {header_bytes} is outside 2..{MAX_HEADER_BYTES}")
        raw = os.pread(self._fd, header_bytes, 8)
        if len(raw) != header_bytes or not raw.startswith(b"{"):
            self._refuse(start, "header does not start with '{'")
        header = Fields(parse_json(raw, f"{where}: header", self._error), where, self._error)
        if header.has("__metadata__"):
            metadata = header.child("__metadata__")
            for key in metadata.keys():
                metadata.text(key)
        names = [name for name in header.keys() if name != "__metadata__"]
        if len(names) > MAX_TENSORS:
            raise self._error(f"{where}: {len(names)} tensors, more than {MAX_TENSORS}")
        data_start = 8 + header_bytes
        entries = {name: _parse_entry(header, name, data_start) for name in names}
        self._check_layout(entries, data_start, file_bytes)
        return entries

    def _refuse(self, start: bytes, problem: str) -> NoReturn:
        """Raise what is wrong with the file's beginning or, where that shows it, what it is."""
        # Only now: a sound header of 640 bytes begins like a pickle.
        for pattern, meaning in _IMPOSTORS:
            if pattern.match(start):
                problem = f"not safetensors but {meaning}"
        raise self._error(f"{self.path}: {problem}")

    def _check_layout(
        self, entries: Mapping[str, TensorEntry], data_start: int, file_bytes: int
    ) -> None:
        """The tensors must tile the data exactly: no hole, overlap or trailing byte."""
        position = data_start
        for name, entry in sorted(
            entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)
        ):
            if entry.offset != position:
                kind = "overlaps another tensor" if entry.offset < position else "leaves a hole"
                raise self._error(
                    f"{self.path}: {name}: data_offsets {entry.offset - data_start} {kind}"
                )
            position += entry.num_bytes
        if position != file_bytes:
            kind = "truncated" if position > file_bytes else "followed by stray bytes"
            raise self._error(
                f"{self.path}: {kind}: the header describes {position} bytes, "
                f"the file has {file_bytes}"
            )


def _parse_entry(header: Fields, name: str, data_start: int) -> TensorEntry:
    if not name or len(name) > MAX_NAME_CHARACTERS or not name.isprintable() or ".." in name:
        header.fail(f"tensor name {ascii(name[:40])} is not allowed")
    field = header.child(name)
    dtype = DTYPES.get(field.text("dtype"))
    if dtype is None:
        field.fail(f"unknown dtype {ascii(field.text('dtype')[:20])}")
    shape = field.integers("shape", 0, MAX_DIM)
    if len(shape) > MAX_RANK:
        field.fail(f"rank {len(shape)} is more than {MAX_RANK}")
    offsets = field.integers("data_offsets", 0, 2**62)
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        field.fail(f"data_offsets {list(offsets)[:4]} are not a start and an end")
    field.done()
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes != offsets[1] - offsets[0]:
        field.fail(
            f"shape {list(shape)} of {dtype_name(dtype)} needs {num_bytes} bytes, "
            f"data_offsets give {offsets[1] - offsets[0]}"
        )
    return TensorEntry(dtype, shape, data_start + offsets[0], num_bytes)


class TensorFileWriter:
    """Writes a safetensors file tensor by tensor, hashing as it goes.

    The tensors are declared up front and appended in that order, each whole or in runs of rows, so
    no more than one piece is ever in memory. The same declarations and contents give the same
    bytes.
    """

    def __init__(
        self, path: Path, declared: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]
    ) -> None:
        """Create `path` (which must not exist) and write its header."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._pending: list[tuple[str, torch.dtype, tuple[int, ...], int]] = []
        offset = 0
        for name, dtype, shape in declared:
            num_bytes = math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": dtype_name(dtype),
                "shape": list(shape),
                "data_offsets": [offset, offset + num_bytes],
            }
            self._pending.append((name, dtype, shape[1:], num_bytes))
            offset += num_bytes
        self._pending.reverse()
        raw = json.dumps(header, separators=(",", ":")).encode("ascii")
        raw += b" " * (-(8 + len(raw)) % DATA_ALIGNMENT_BYTES)
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0
        self._file = NewFile(path)
        try:
            self._write(len(raw).to_bytes(8, "little") + raw)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file up, or back after `finish`."""
        self._file.close()

    def append(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, or the next rows of it; `name` must be the next one declared."""
        while self._pending and self._pending[-1][3] == 0 and self._pending[-1][0] != name:
            self._pending.pop()
        expected, dtype, row_shape, remaining = self._pending[-1]
        assert (name, tensor.dtype) == (expected, dtype), f"{name} where {expected} was declared"
        assert tensor.shape[1:] == row_shape and tensor.nbytes <= remaining
        self._pending[-1] = (expected, dtype, row_shape, remaining - tensor.nbytes)
        if tensor.nbytes:
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            self._write(flat.numpy().data)

    def finish(self) -> FileDigest:
        """Flush to the disk and return size and digest; all that was declared must be written."""
        missing = [name for name, _, _, remaining in self._pending if remaining]
        assert not missing, f"never written: {missing}"
        self._file.finish()
        return FileDigest(self._num_bytes, self._sha256.hexdigest())

    def _write(self, data: bytes | memoryview) -> None:
        # Hashing takes about as long as writing, and neither needs the other.
        hashing = Thread(target=self._sha256.update, args=(data,))
        hashing.start()
        try:
            self._file.append(data)
        finally:
            hashing.join()
        self._num_bytes += len(data)

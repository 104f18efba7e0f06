"""One file from the hub into the cache: continued where it was cut, held against its digest.

What has arrived waits beside its place in the cache under the digest that it must have, so whoever
runs next goes on there. It gets its name only once all of it is there and is what the hub listed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import httpx2
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.utils import WeakFileLock

from moeconsolidate.hub.client import PinnedModel, RemoteFile, stream, telling
from moeconsolidate.publish import require_disk
from moeruntime.errors import HubError, IntegrityError

__all__ = ["check_cached", "download", "missing_bytes"]

CHUNK_BYTES = 4 * 1024 * 1024
FIRST_PAUSE_S = 1.0
MAX_FAILURES = 5
"""In a row, without a byte more than ever before."""

OnBytes = Callable[[int], None]
"""Called with how much of a file is there."""


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def download(model: PinnedModel, file: RemoteFile, on_bytes: OnBytes) -> None:
    """See to it that the cache holds a file's contents, whole and checked.

    Raises:
        HubError: the hub refuses or stays out of reach; what has arrived is kept.
        IntegrityError: what arrived is not what the hub listed; it is removed.
        ResourceError: the disk has no room for it.
    """
    blob = model.blob(file)
    blob.parent.mkdir(parents=True, exist_ok=True)
    locks = model.storage.parent / ".locks" / model.storage.name
    locks.mkdir(parents=True, exist_ok=True)
    # huggingface-hub locks the same file while it downloads.
    with WeakFileLock(locks / f"{file.digest}.lock"):
        if not blob.exists():
            partial = partial_of(blob)
            _fetch(model, file, partial, on_bytes)
            partial.rename(blob)
            _remember(blob)
    check_cached(blob, on_bytes)


def missing_bytes(model: PinnedModel, file: RemoteFile) -> int:
    """How much of a file `download` would have to ask for."""
    blob = model.blob(file)
    if blob.exists():
        return 0
    partial = partial_of(blob)
    arrived = partial.stat().st_size if partial.exists() else 0
    return max(0, file.num_bytes - arrived)


def partial_of(blob: Path) -> Path:
    """Where what has arrived of a file waits."""
    return blob.with_name(f"{blob.name}.moec-partial")


def check_cached(blob: Path, on_bytes: OnBytes) -> None:
    """Hold a file of the cache against the digest that is its name, unless that was done before.

    Raises:
        IntegrityError: it is something else.
    """
    if not _is_remembered(blob):
        num_bytes = blob.stat().st_size
        digest = _new_hash(blob.name, num_bytes)
        _hash_file(blob, digest, on_bytes)
        if digest.hexdigest() != blob.name:
            raise IntegrityError(
                f"{blob}: not what the hub listed: the cache is damaged; remove this file"
            )
        _remember(blob)


def _fetch(model: PinnedModel, file: RemoteFile, partial: Path, on_bytes: OnBytes) -> None:
    """Bring `partial` to its whole size, flushed and checked."""
    digest = _new_hash(file.digest, file.num_bytes)
    with partial.open("ab+") as out:
        done = out.seek(0, os.SEEK_END)
        if done > file.num_bytes:
            done = 0
            out.truncate(0)
        require_disk(partial.parent, file.num_bytes - done)
        _hash_file(partial, digest, on_bytes)
        farthest, failures = done, 0
        while done < file.num_bytes:
            cause = "the connection was cut"
            try:
                with stream(model, file.name, start=done, stop=file.num_bytes) as response:
                    if done and response.status_code != 206:  # it knows no ranges
                        done = 0
                        out.truncate(0)
                        digest = _new_hash(file.digest, file.num_bytes)
                    for chunk in response.iter_bytes():  # as they come: none is lost with a cut
                        done += len(chunk)
                        if done > file.num_bytes:
                            break
                        out.write(chunk)
                        digest.update(chunk)
                        on_bytes(done)
            except httpx2.TransportError as problem:
                cause = type(problem).__name__
            except HfHubHTTPError as problem:
                status = problem.response.status_code
                if isinstance(problem, EntryNotFoundError) or status not in (408, 429, *_SERVER):
                    with telling(model.ref):
                        raise
                cause = f"status {status}"
            if done > file.num_bytes:
                out.truncate(0)
                raise IntegrityError(
                    f"{model}: {file.name} is longer than the {file.num_bytes} bytes the hub lists"
                )
            if done < file.num_bytes:
                failures = 0 if done > farthest else failures + 1
                farthest = max(farthest, done)
                out.flush()
                if failures > MAX_FAILURES:
                    raise HubError(
                        f"{model}: {file.name}: {cause} after {done} of {file.num_bytes} bytes; "
                        "they are kept, and the same command goes on from there"
                    )
                time.sleep(FIRST_PAUSE_S * 2 ** max(0, failures - 1))
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != file.digest:
        partial.unlink()
        raise IntegrityError(
            f"{model}: {file.name} has digest {digest.hexdigest()}, the hub lists {file.digest}; "
            "removed: run again to download it anew"
        )


_SERVER = (500, 502, 503, 504)


def _new_hash(expected: str, num_bytes: int) -> _Hash:
    """The hash that an expected digest was made with, told by its length."""
    if len(expected) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % num_bytes, usedforsecurity=False)  # git's object id


def _hash_file(path: Path, digest: _Hash, on_bytes: OnBytes) -> None:
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            on_bytes(done)


def _mark(blob: Path) -> Path:
    return blob.parent.parent / ".moec-checked" / blob.name


def _identity(blob: Path) -> str:
    stat = blob.stat()
    return f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}\n"


def _remember(blob: Path) -> None:
    """Note that a file was checked, so that gigabytes are not read again for it next time."""
    _mark(blob).parent.mkdir(exist_ok=True)
    _mark(blob).write_text(_identity(blob), encoding="ascii")


def _is_remembered(blob: Path) -> bool:
    try:
        return _mark(blob).read_text(encoding="ascii") == _identity(blob)
    except (OSError, ValueError):
        return False

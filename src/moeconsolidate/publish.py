"""A folder that appears whole or not at all.

It is written under a hidden name beside its target, flushed to the disk, and renamed. Whatever ends
the writing early (an error, Ctrl-C, a polite kill) also removes what was written.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moeruntime.errors import ResourceError, UsageError

__all__ = ["check_target", "require_disk", "staged_folder", "write_file"]

# Room for folders, headers and small files, which no prediction counts one by one.
DISK_MARGIN_BYTES = 1024 * 1024


def check_target(target: Path, *, inputs: Iterable[Path]) -> None:
    """Check that `target` can be created, before any work is done for it.

    Raises:
        UsageError: it exists, its parent does not, or it would lie inside one of the inputs.
    """
    if os.path.lexists(target):
        raise UsageError(f"{target}: exists already; remove it or choose another name")
    if not target.name or target.name == "..":
        raise UsageError(f"{target}: not a name for a new folder")
    if not target.parent.is_dir():
        raise UsageError(f"{target}: its parent {target.parent} is not an existing folder")
    home = target.parent.resolve()
    for folder in inputs:
        if home.is_relative_to(folder.resolve()):
            raise UsageError(f"{target}: lies inside the input {folder}; write it elsewhere")


def require_disk(folder: Path, num_bytes: int) -> None:
    """Raise ResourceError unless the disk that holds `folder` has room for so many more bytes."""
    needed_bytes = num_bytes + DISK_MARGIN_BYTES
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise ResourceError(
            f"{folder}: {free_bytes / 1e9:.3f} GB free on this disk, "
            f"{needed_bytes / 1e9:.3f} GB needed"
        )


def write_file(path: Path, contents: bytes) -> None:
    """Write a new file and flush it to the disk itself."""
    with path.open("xb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends well.

    Raises:
        UsageError: `target` has appeared meanwhile.
        ResourceError: the disk is full, read-only or broken.
    """
    staging = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    try:
        staging.mkdir()
        yield staging
        _flush_folders(staging)
        if os.path.lexists(target):
            raise UsageError(f"{target}: appeared while it was being written; left as it is")
        staging.rename(target)
        _flush_folder(target.parent)
    except BaseException as problem:
        try:
            _remove(staging)
        except (KeyboardInterrupt, SystemExit):  # a signal before `_remove` turned them off
            _remove(staging)
        # A broken pipe is about where progress is printed, not about this disk.
        if isinstance(problem, OSError) and not isinstance(problem, BrokenPipeError):
            reason = problem.strerror or str(problem)
            raise ResourceError(f"{target}: cannot be written: {reason}") from problem
        raise


def _remove(folder: Path) -> None:
    """Remove a folder and finish doing so, however often Ctrl-C is pressed."""
    # Only the main thread receives signals, and only it may say what they do.
    if threading.current_thread() is not threading.main_thread():
        shutil.rmtree(folder, ignore_errors=True)
        return
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        for number, handler in before.items():
            if handler is not None:  # set by a library outside Python, which alone can put it back
                signal.signal(number, handler)


def _flush_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        _flush_folder(Path(folder))


def _flush_folder(folder: Path) -> None:
    """A file's name is part of its folder, which has to reach the disk as well."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

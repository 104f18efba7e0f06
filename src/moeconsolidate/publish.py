"""A folder that appears whole or not at all.

It is written in a hidden folder beside its target, flushed to the disk, and renamed. Whatever ends
the writing early (an error, Ctrl-C, a kill) either removes what was written or leaves it where the
next run for the same target finds it. A lock keeps two runs from meeting there.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moeruntime.errors import ResourceError, UsageError

__all__ = [
    "JOURNAL_FOLDER",
    "PACK_FOLDER",
    "check_target",
    "require_disk",
    "staged_folder",
    "write_file",
]

PACK_FOLDER, JOURNAL_FOLDER = "pack", "journal"
"""In a staging folder: what becomes the target, and what is known of it until then."""

_LOCK = "lock"
_STAGED = {PACK_FOLDER, JOURNAL_FOLDER, _LOCK}
_log = logging.getLogger(__name__)

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
def staged_folder(
    target: Path, *, kept: Callable[[BaseException], str | None] | None = None
) -> Iterator[Path]:
    """Yield a folder for this target alone, whose subfolder PACK_FOLDER becomes `target`.

    That happens when the block ends well. However it ends, what was written is removed, unless
    `kept` has a reason to leave it to the next run: then, and after a kill, the folder is yielded
    again as it was left.

    Args:
        target: a path that does not exist, in a folder that does.
        kept: called with what ended the block; says what is kept, or None. Without it, nothing is.

    Raises:
        UsageError: somebody else is writing to this target, or it has appeared meanwhile.
        ResourceError: the disk is full, read-only or broken.
    """
    staging = target.parent / f".{target.name}.partial"
    try:
        lock = _lock(staging, target)
    except OSError as problem:
        raise _not_written(target, problem) from problem
    published = False
    try:
        if kept is None:
            _remove(staging / PACK_FOLDER)
        (staging / PACK_FOLDER).mkdir(exist_ok=True)
        yield staging
        _flush_folders(staging / PACK_FOLDER)
        if os.path.lexists(target):
            raise UsageError(f"{target}: appeared while it was being written; left as it is")
        (staging / PACK_FOLDER).rename(target)
        published = True
        _flush_folder(target.parent)
        _remove(staging)
    except BaseException as problem:
        told = kept(problem) if kept and not published else None
        if told:
            _log.warning("%s; the same command goes on from there (%s)", told, staging)
        else:
            try:
                _remove(staging)
            except (KeyboardInterrupt, SystemExit):  # a signal before `_remove` turned them off
                _remove(staging)
        # A broken pipe is about where progress is printed, not about this disk.
        if isinstance(problem, OSError) and not isinstance(problem, BrokenPipeError):
            raise _not_written(target, problem) from problem
        raise
    finally:
        os.close(lock)


def _lock(staging: Path, target: Path) -> int:
    """Make the folder, or take over what a killed process left of it; returns the lock's file."""
    while True:
        if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
            raise UsageError(f"{staging}: not a folder; remove it: {target} is prepared there")
        staging.mkdir(exist_ok=True)
        _check_staging(staging, target)
        try:
            lock = os.open(staging / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:  # whoever had it has just finished
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.sameopenfile(lock, probe := os.open(staging / _LOCK, os.O_RDONLY)):
                os.close(probe)
                return lock
            os.close(probe)
        except BlockingIOError:
            os.close(lock)
            raise UsageError(
                f"{target}: another moec is writing it; wait for that, or choose another name"
            ) from None
        except FileNotFoundError:
            pass
        os.close(lock)


def _check_staging(staging: Path, target: Path) -> None:
    """Refuse a folder that somebody else made: what is in it will be removed."""
    strangers = sorted(
        path.name for path in staging.iterdir() if path.name not in _STAGED or path.is_symlink()
    )
    if strangers or staging.stat().st_uid != os.geteuid():
        raise UsageError(
            f"{staging / strangers[0] if strangers else staging}: not made by this user's moec, "
            f"which prepares {target} in that folder; move it away"
        )


def _not_written(target: Path, problem: OSError) -> ResourceError:
    return ResourceError(f"{target}: cannot be written: {problem.strerror or problem}")


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

"""Consolidation killed, and its disk failing, at any moment: what is left, and what comes next.

Whatever happens, the target must be absent or pass `moec verify`, and the same call again must give
the bytes of a run that nothing happened to. The tests do a little of this; all of it:

    PYTHONPATH=src:tests python tests/crash.py --kills 200
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers import TINY_CONFIG, random_tensors, save_shards, tree_digests

NUM_LAYERS = 6
Digests = dict[str, str]


def make_models(parent: Path, tokenizer: Path) -> list[Path]:
    """Two checkpoints of six small layers."""
    config = TINY_CONFIG | {"num_hidden_layers": NUM_LAYERS, "vocab_size": 4096}
    folders = []
    for seed, name in enumerate("ab"):
        folder = parent / name
        folder.mkdir(parents=True)
        save_shards(folder, random_tensors(config, seed), 0)
        (folder / "config.json").write_text(json.dumps(config))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / file, folder)
        folders.append(folder)
    return folders


def compile_pack(models: list[Path], target: Path) -> None:
    from moeconsolidate import consolidate

    consolidate(models, target)


def check_left(target: Path) -> bool:
    """Check what a run that came to a bad end left; returns whether that is a whole pack."""
    from moeruntime import verify_pack

    if target.exists():
        verify_pack(target)
    assert {path.name for path in target.parent.iterdir()} <= {
        target.name,
        f".{target.name}.partial",
    }
    return target.exists()


def check_next(models: list[Path], target: Path, expected: Digests) -> None:
    """Run once more, if there is no pack yet, and compare it byte by byte."""
    if not target.exists():
        compile_pack(models, target)
    assert tree_digests(target) == expected
    shutil.rmtree(target)
    shutil.rmtree(target.parent / f".{target.name}.partial", ignore_errors=True)


# -- kills -----------------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> int:
    """Do something in a fork of this process; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_random(
    models: list[Path], target: Path, expected: Digests, num_kills: int, seed: int
) -> tuple[int, int]:
    """Kill so many runs with SIGKILL, each at a random moment, and finish each after that.

    Must be called before this process has used torch: it forks.

    Returns:
        How many runs were killed in their work, and how many of these left finished layers.
    """
    rng = random.Random(seed)
    num_killed = num_kept = 0
    start = time.monotonic()
    assert wait(in_child(lambda: compile_pack(models, target))) == 0
    duration_s = time.monotonic() - start
    shutil.rmtree(target)
    while num_killed < num_kills:
        child = in_child(lambda: compile_pack(models, target))
        time.sleep(rng.uniform(0, duration_s))
        os.kill(child, signal.SIGKILL)
        killed = wait(child) == -signal.SIGKILL
        num_killed += killed
        journal = target.parent / f".{target.name}.partial" / "journal"
        num_kept += killed and journal.is_dir() and any(journal.iterdir())

        def examine() -> None:
            check_left(target)
            check_next(models, target, expected)

        assert wait(in_child(examine)) == 0
    return num_killed, num_kept


# -- faults ----------------------------------------------------------------------------------------


class _FailingFile:
    """A file whose writes count."""

    def __init__(self, file: Any, step: Callable[[str], None]) -> None:
        self._file, self._step = file, step

    def write(self, data: Any) -> int:
        try:
            self._step("write")
        except OSError:
            self._file.write(bytes(memoryview(data).cast("B")[: len(data) // 2]))
            self._file.flush()
            raise
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _FailingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def faults(at: int | None, code: int = 0) -> Iterator[list[str]]:
    """Let the operation of that number fail: a write (after half of it), fsync, rename, mkdir.

    Yields the list of operations there were.
    """
    done: list[str] = []

    def step(kind: str) -> None:
        done.append(kind)
        if len(done) - 1 == at:
            raise OSError(code, os.strerror(code))

    originals = {name: getattr(os, name) for name in ("fsync", "rename", "mkdir")}
    original_open = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = original_open(self, mode, *args, **kwargs)
        return _FailingFile(file, step) if mode == "xb" else file

    def failing(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            step(name)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(os, name, failing(name))
    Path.open = opened  # type: ignore[assignment, method-assign]
    try:
        yield done
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
        Path.open = original_open  # type: ignore[method-assign]


def fail_everywhere(
    models: list[Path], target: Path, expected: Digests, *, stride: int = 1
) -> dict[str, int]:
    """Let every operation, or every so many-th, fail once; returns how many of each did."""
    from moeruntime.errors import ResourceError

    compile_pack(models, target)  # makes folders to keep machine code in, once, and may do without
    shutil.rmtree(target)
    with faults(None) as operations:
        compile_pack(models, target)
    shutil.rmtree(target)
    failed: dict[str, int] = {}
    for at in range(0, len(operations), stride):
        code = (errno.ENOSPC, errno.EIO)[at // stride % 2]
        try:
            with faults(at, code) as done:
                compile_pack(models, target)
        except ResourceError as problem:
            assert os.strerror(code) in str(problem), problem
        else:  # making a folder that is there already may fail
            assert done[at] == "mkdir", f"{done[at]} {at} failed, and nobody said so"
            assert target.exists()
        failed[done[at]] = failed.get(done[at], 0) + 1
        check_left(target)
        check_next(models, target, expected)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1, help="fail every so many-th operation")
    parser.add_argument("--skip-faults", action="store_true")
    parser.add_argument("--work", type=Path, default=None, help="where to write; a new folder")
    args = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(dir=args.work, prefix="moec-crash-") as scratch:
        work = Path(scratch)
        import torch

        import moeconsolidate.pipeline  # noqa: F401 - before the forks, which then start at once

        torch.set_num_threads(1)
        models = make_models(work / "models", root / "examples" / "checkpoints" / "mini-base")
        (work / "out").mkdir()
        target = work / "out" / "pack"
        assert wait(in_child(lambda: compile_pack(models, target))) == 0
        expected = tree_digests(target)
        shutil.rmtree(target)
        report: dict[str, Any] = {}
        killed, kept = kill_at_random(models, target, expected, args.kills, args.seed)
        report["killed"], report["of_these_with_finished_layers"] = killed, kept
        if not args.skip_faults:
            report["failed"] = fail_everywhere(models, target, expected, stride=args.stride)
    print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())

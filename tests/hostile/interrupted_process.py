"""Runs commands in forks of a process that has imported everything, and sends them signals.

One JSON job a line: {"arguments": [...], "signals": [[place, number], ...], "copies": 1}. A place
is a key of PLACES, where the command sends the signal to itself when it first gets there, or text:
once the command has printed that on stderr, it is sent from outside. Answers with a list of
[exit code, stderr], one a copy, all of which run at the same time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import moeruntime.runner
from moeconsolidate import checkpoint, cli, process, publish, writer

PLACES: dict[str, tuple[Any, str]] = {
    "parsing": (cli, "app"),
    "reading": (checkpoint.Checkpoint, "read_expert"),
    "writing": (writer, "write_file"),
    "flushing": (publish, "_flush_folders"),
    "cleaning": (shutil, "rmtree"),
    "exiting": (process, "_flush"),
    "generating": (moeruntime.runner.Runner, "launch"),
}
OUTSIDE_PAUSE_S = 0.03
DEADLINE_S = 20.0


def send_to_oneself(place: str, number: int) -> None:
    owner, name = PLACES[place]
    original: Callable[..., Any] = getattr(owner, name)
    sent = False

    def signalling(*args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        if not sent:
            sent = True
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, signalling)


def slow_down() -> None:
    """Make sure that the command is still at work when a signal comes from outside."""
    original = checkpoint.Checkpoint.read_expert

    def slowly(*args: Any, **kwargs: Any) -> str:
        time.sleep(0.02)
        return original(*args, **kwargs)

    checkpoint.Checkpoint.read_expert = slowly  # type: ignore[method-assign]


def wait_for(err: Any, text: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while text.encode() not in os.pread(err.fileno(), 65536, 0):
        assert time.monotonic() < deadline, f"never printed: {text}"
        time.sleep(0.002)


def reap(child: int) -> int:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
    cli.main(["consolidate", "none", "neither", "--out", "out"])  # imports what it needs
faulthandler.enable()  # shows where, should one crash
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    outside = [one for one in job["signals"] if one[0] not in PLACES]
    children = []
    for _ in range(job["copies"]):
        err = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
        child = os.fork()
        if child == 0:
            os.dup2(err.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            slow_down()
            for place, number in job["signals"]:
                if place in PLACES:
                    send_to_oneself(place, number)
            cli.main(job["arguments"])
        children.append((child, err))
    for text, number in outside:
        wait_for(children[0][1], text)
        os.kill(children[0][0], number)
        time.sleep(OUTSIDE_PAUSE_S)
    answers = []
    for child, err in children:
        code = reap(child)
        answers.append((code, os.pread(err.fileno(), 65536, 0).decode()))
        err.close()
    print(json.dumps(answers), flush=True)

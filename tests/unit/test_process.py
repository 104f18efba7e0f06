"""How the process ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import threading
from moeconsolidate.process import run_and_exit

def app(arguments, **options):
    lock = threading.Lock()
    with lock:
        try:
            raise {first}
        finally:
            lock.release()
            {then}

run_and_exit(app, [])
"""


@pytest.mark.parametrize(
    ("first", "then", "code"),
    [
        ("KeyboardInterrupt", "pass", 130),
        ("SystemExit(143)", "pass", 143),
        ("SystemExit(143)", "raise KeyboardInterrupt", 143),
        ("ValueError", "pass", 1),
    ],
)
def test_a_lock_that_a_signal_kept_from_being_taken_back_is_no_bug(
    first: str, then: str, code: int
) -> None:
    """`with` then releases what is not locked: RuntimeError, behind which is what came first."""
    program = PROGRAM.format(first=first, then=then)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert bool(done.stderr) == (code == 1)

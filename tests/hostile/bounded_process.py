"""Runs commands, one JSON list [extra bytes, arguments] a line, each in bounded memory."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sys
from pathlib import Path

import moeruntime.engine  # noqa: F401
from moeconsolidate.cli import main


def run(arguments: list[str]) -> tuple[object, str]:
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(arguments)
        except SystemExit as end:
            return end.code, err.getvalue()


# Commands import what they need when they are called; the bound is to be about their data.
for command in (["consolidate", "none", "neither", "--out", "out"], ["inspect", "none"]):
    assert run(command)[0] == 3
for line in sys.stdin:
    extra_bytes, call = json.loads(line)
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = num_pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    result = run(call)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps(result), flush=True)

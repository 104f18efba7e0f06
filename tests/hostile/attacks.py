"""Tools to spoil sound files with, so that only the spoilt thing is wrong with them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Edit = Callable[[Any], object]
"""Changes a parsed JSON document in place."""

MAX_LINE_CHARACTERS = 1000
MOEC = [sys.executable, "-c", "from moeconsolidate.cli import main; main()"]


def one_line(stderr: str) -> str:
    """Check that this is a complaint, the whole of it and nothing else."""
    assert stderr.startswith("moec: error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n")
    assert "Traceback" not in stderr
    assert "internal:" not in stderr, stderr
    assert len(stderr) < MAX_LINE_CHARACTERS
    return stderr


def edit_json(path: Path, edit: Edit) -> None:
    """Change a JSON file."""
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def forge(pack: Path, file: str, contents: bytes) -> None:
    """Replace or add a file of a pack, with the size and the digest that the manifest wants."""
    (pack / file).write_bytes(contents)
    entry = {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
    edit_json(pack / "manifest.json", lambda manifest: manifest["files"].update({file: entry}))


def forge_json(pack: Path, file: str, edit: Edit) -> None:
    """Change a JSON file of a pack, and its digest with it."""
    document = json.loads((pack / file).read_text())
    edit(document)
    forge(pack, file, json.dumps(document).encode())


def flip_bit(path: Path, position: int) -> None:
    """Flip one bit of the byte at `position`, counted from the end where it is negative."""
    contents = bytearray(path.read_bytes())
    contents[position] ^= 1
    path.write_bytes(contents)


def run_bounded(calls: Sequence[Sequence[object]], extra_bytes: int) -> list[tuple[int, str]]:
    """Run commands in a process that can take no more than `extra_bytes` once it has started.

    Returns:
        (exit code, what was printed on stderr) of each.
    """
    script = (
        "import contextlib, io, json, resource, sys\n"
        "import moeruntime.engine, moeconsolidate.pipeline, moeconsolidate.report\n"
        "import moeconsolidate.console, rich.console, rich.table\n"
        "from moeconsolidate.cli import main\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        f"limit = pages * resource.getpagesize() + {extra_bytes}\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "results = []\n"
        "for call in json.loads(sys.argv[1]):\n"
        "    err = io.StringIO()\n"
        "    with contextlib.redirect_stderr(err):\n"
        "        try: main(call)\n"
        "        except SystemExit as end: results.append([end.code, err.getvalue()])\n"
        "print(json.dumps(results))\n"
    )
    plain = json.dumps([[str(argument) for argument in call] for call in calls])
    done = subprocess.run(
        [sys.executable, "-c", script, plain], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [(code, err) for code, err in json.loads(done.stdout.splitlines()[-1])]

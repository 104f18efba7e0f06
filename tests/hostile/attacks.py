"""Tools to spoil sound files with, so that only the spoilt thing is wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Edit = Callable[[Any], object]
"""Changes a parsed JSON document in place."""

MAX_LINE_CHARACTERS = 2100
MOEC = [sys.executable, "-c", "from moeconsolidate.cli import main; main()"]
HELPERS = Path(__file__).parent


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


def entries(root: Path) -> list[str]:
    """Everything in a folder, hidden or not; links are not followed."""
    return sorted(
        f"{folder}/{name}"
        for folder, folders, files in os.walk(root)
        for name in (*folders, *files)
    )


def restore(root: Path, contents: Mapping[Path, bytes]) -> None:
    """Put a folder right: these files with these contents, and nothing else."""
    files = {str(path) for path in contents}
    folders = {os.path.dirname(file) for file in files}  # noqa: PTH120 - of 50 files, 800 times
    folders |= {os.path.dirname(folder) for folder in folders}  # noqa: PTH120
    for entry in reversed(entries(root)):
        path = Path(entry)
        if path.is_dir() and not path.is_symlink():
            if entry not in folders:
                path.rmdir()
        elif entry not in files or path.is_symlink() or not path.is_file():
            path.unlink()
    for path, expected in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Sizes first: a file may have been made of a million megabytes of holes.
        same_size = path.exists() and path.stat().st_size == len(expected)
        if not same_size or path.read_bytes() != expected:
            path.write_bytes(expected)


class Bounded:
    """A process that runs commands and gives each no more than some memory."""

    def __init__(self) -> None:
        script = str(HELPERS / "bounded_process.py")
        self._process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, extra_bytes: int, *arguments: object) -> tuple[int, str]:
        """Run one command; returns its exit code, and what it printed on stderr."""
        assert self._process.stdin and self._process.stdout
        call = [extra_bytes, [str(argument) for argument in arguments]]
        print(json.dumps(call), file=self._process.stdin, flush=True)
        code, err = json.loads(self._process.stdout.readline())
        return code, err

    def close(self) -> None:
        self._process.communicate()

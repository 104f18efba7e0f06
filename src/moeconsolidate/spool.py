"""Tensors set aside on disk: what calibration learns of a layer is as large as the layer.

Pages of a file that is mapped can be dropped and read again, so what is looked at once a layer
takes no memory for long. The folder is made in TMPDIR and goes with the object, or at exit.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch

from moeruntime.errors import ResourceError

__all__ = ["Spool"]


class Spool:
    """A folder of tensors by name, removed when nobody holds the spool any more."""

    def __init__(self) -> None:
        """Make the folder.

        Raises:
            ResourceError: there is nowhere to make it.
        """
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="moec-"))
        except OSError as problem:
            raise ResourceError(f"no folder for temporary files: {problem}") from None
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def put(self, name: str, value: object) -> None:
        """Set tensors aside, in tuples, lists and dicts of numbers and strings or alone.

        Raises:
            ResourceError: the disk is full.
        """
        try:
            torch.save(value, self._folder / name)
        except (OSError, RuntimeError) as problem:
            (self._folder / name).unlink(missing_ok=True)
            raise ResourceError(
                f"{self._folder}: no room for calibration ({problem}); TMPDIR names another place"
            ) from None

    def get(self, name: str) -> Any:
        """What was set aside, mapped; changes stay in memory."""
        return torch.load(self._folder / name, mmap=True, weights_only=True)

    def drop(self, name: str) -> None:
        """Forget it, and free the disk; what has been got stays valid."""
        (self._folder / name).unlink()

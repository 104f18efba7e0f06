"""Compiled kernels kept on disk: a machine compiles them once, and not at each start."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

__all__ = ["FOLDER_VARIABLE", "ImageCache"]

FOLDER_VARIABLE = "MOEC_KERNEL_CACHE"
"""Environment variable: where they are kept, in place of the user's cache folder."""

_DIGEST_BYTES = 32


class ImageCache:
    """Images by a key. Whatever goes wrong with a file, it is as if it were not there."""

    def __init__(self, folder: Path | None = None) -> None:
        """Keep them in a folder, which need not exist yet; by default in the user's, if any."""
        self._folder = folder or _default_folder()

    def get(self, key: str) -> bytes | None:
        """What was put there under a key, if it is whole."""
        if self._folder is None:
            return None
        with contextlib.suppress(OSError):
            content = _file(self._folder, key).read_bytes()
            digest, image = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if image and hashlib.sha256(image).digest() == digest:
                return image
        return None

    def put(self, key: str, image: bytes) -> None:
        """Keep an image; other processes see it whole, or not at all."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder)
            os.close(handle)
            try:
                Path(name).write_bytes(hashlib.sha256(image).digest() + image)
                Path(name).replace(_file(self._folder, key))
            except OSError:
                Path(name).unlink()
                raise


def _file(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"


def _default_folder() -> Path | None:
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(caches).expanduser() / "moec" / "kernels"
    except RuntimeError:  # nobody knows of a home
        return None

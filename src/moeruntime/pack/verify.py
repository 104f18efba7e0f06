"""Believing a pack: every byte against its digest, and no file the manifest does not know."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from moeruntime.errors import IntegrityError
from moeruntime.pack.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest
from moeruntime.pack.reader import Pack

__all__ = ["verify_pack"]


def verify_pack(root: Path | str, *, on_file: Callable[[str, int], None] | None = None) -> Manifest:
    """Check schema, references, sizes and headers, then that no file is extra, then every digest.

    Args:
        root: the pack's folder.
        on_file: called with (path, bytes) after each file that held.

    Returns:
        The manifest, now known to be true of the files.

    Raises:
        IntegrityError: the first lie found.
    """
    with Pack(root) as pack:
        _check_no_extra(pack.root, pack.manifest)
        for path, expected in sorted(pack.manifest.files.items()):
            pack.check_digest(path)
            if on_file:
                on_file(path, expected.num_bytes)
        return pack.manifest


def _check_no_extra(root: Path, manifest: Manifest) -> None:
    known = {*manifest.files, MANIFEST_NAME, SIGNATURE_NAME}
    folders = {str(parent) for path in known for parent in Path(path).parents}
    for folder, subfolders, files in os.walk(root):
        for name in sorted(subfolders):
            relative = (Path(folder) / name).relative_to(root).as_posix()
            if relative not in folders:
                raise IntegrityError(f"{root / relative}: a folder the manifest does not know")
        for name in sorted(files):
            relative = (Path(folder) / name).relative_to(root).as_posix()
            if relative not in known:
                raise IntegrityError(f"{root / relative}: a file the manifest does not know")

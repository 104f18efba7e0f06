"""Which models to consolidate, and what to call them: `[NAME=]MODEL`, as typed or as passed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moeruntime.errors import CheckpointError, UsageError
from moeruntime.pack.manifest import valid_variant_name

__all__ = ["Models", "Source", "parse_sources"]

ModelRef = str | os.PathLike[str]
Models = Iterable[ModelRef] | Mapping[str, ModelRef]
"""`["math=folder", "other-folder"]`, or `{"math": "folder", "other": "other-folder"}`."""

NAME_RULES = (
    "letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 64, "
    "not ending in '.' or '.safetensors', not 'common'"
)


@dataclass(frozen=True, slots=True)
class Source:
    """One model to consolidate: the variant's name and the checkpoint's folder."""

    name: str
    folder: Path


def parse_sources(models: Models) -> tuple[Source, ...]:
    """Turn what the caller named into at least two distinct checkpoint folders.

    A name is everything before the first "=", unless that part holds a "/": "./a=b" is a folder.
    Without a name, a variant is called as its folder is.

    Raises:
        UsageError: fewer than two models, a bad name, one name or one folder twice.
        CheckpointError: there is no such folder.
    """
    if isinstance(models, str | bytes | os.PathLike):
        raise UsageError("models must be a list of [NAME=]MODEL, not a single one")
    if isinstance(models, Mapping):
        sources = tuple(_source(name, os.fspath(folder)) for name, folder in models.items())
    else:
        sources = tuple(_source(*_split(os.fspath(model))) for model in models)
    if len(sources) < 2:
        raise UsageError(f"consolidation needs at least two models, got {len(sources)}")
    names: dict[str, Source] = {}
    folders: dict[Path, Source] = {}
    for source in sources:
        namesake = names.setdefault(source.name.casefold(), source)
        if namesake is not source:
            raise UsageError(
                f"{namesake.folder} and {source.folder} would both be called '{source.name}' "
                "(case is ignored); name them apart with NAME=MODEL"
            )
        twin = folders.setdefault(source.folder.resolve(), source)
        if twin is not source:
            raise UsageError(
                f"variants '{twin.name}' and '{source.name}' are the same folder {source.folder}"
            )
    return sources


def _split(model: str) -> tuple[str | None, str]:
    name, equals, folder = model.partition("=")
    return (name, folder) if equals and "/" not in name else (None, model)


def _source(name: str | None, folder: str) -> Source:
    path = Path(folder)
    if not folder:
        raise UsageError(f"'{name or ''}=' names no model; write NAME=FOLDER")
    if name is not None and not valid_variant_name(name):
        raise UsageError(f"{ascii(name[:80])} is not a variant name: {NAME_RULES}")
    if not os.path.isdir(path):  # noqa: PTH112 - Path.is_dir() raises for a name that is too long
        problem = "not a folder" if os.path.lexists(path) else "no such folder"
        raise CheckpointError(
            f"{folder}: {problem}; MODEL must be a downloaded checkpoint folder "
            "(hub ids are not fetched)"
        )
    if name is None:
        # The name as typed, so that a link called "latest" is "latest"; "." and ".." are resolved.
        name = Path(os.path.abspath(path)).name  # noqa: PTH100 - resolve() would follow links
        if not valid_variant_name(name):
            raise UsageError(
                f"{folder}: the folder's name {ascii(name[:80])} cannot be a variant name "
                f"({NAME_RULES}); give one with NAME={folder}"
            )
    return Source(name, path)

"""Which models to consolidate, and what to call them: `[NAME=]MODEL`, as typed or as passed.

A model is a folder or, where there is no such folder, `ORG/NAME[@REVISION]` on the hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moeruntime.errors import CheckpointError, UsageError
from moeruntime.pack.manifest import valid_variant_name

__all__ = ["HubRef", "Models", "Source", "parse_hub_ref", "parse_sources"]

ModelRef = str | os.PathLike[str]
Models = Iterable[ModelRef] | Mapping[str, ModelRef]
"""`["math=folder", "org/name"]`, or `{"math": "folder", "other": "org/name@revision"}`."""

_HUB_REF = re.compile(
    r"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})"
    r"(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,254}))?"
)

NAME_RULES = (
    "letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 64, "
    "not ending in '.' or '.safetensors', not 'common'"
)


@dataclass(frozen=True, slots=True)
class HubRef:
    """A model on the hub, as it was asked for.

    Attributes:
        repo: "org/name".
        revision: a branch, a tag or a commit.
    """

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


@dataclass(frozen=True, slots=True)
class Source:
    """One model to consolidate: the variant's name, and the folder or hub model it comes from."""

    name: str
    origin: Path | HubRef


def parse_sources(models: Models) -> tuple[Source, ...]:
    """Turn what the caller named into at least two distinct models.

    A name is everything before the first "=", unless that part holds a "/": "./a=b" is a folder.
    Without a name, a variant is called as its folder or its hub repository is. Nothing is asked of
    the hub here.

    Raises:
        UsageError: fewer than two models, a bad name, one name or one model twice.
        CheckpointError: there is no such folder, and it cannot be on the hub either.
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
    origins: dict[Path | HubRef, Source] = {}
    for source in sources:
        namesake = names.setdefault(source.name.casefold(), source)
        if namesake is not source:
            raise UsageError(
                f"{namesake.origin} and {source.origin} would both be called '{source.name}' "
                "(case is ignored); name them apart with NAME=MODEL"
            )
        is_folder = isinstance(source.origin, Path)
        twin = origins.setdefault(
            source.origin.resolve() if isinstance(source.origin, Path) else source.origin, source
        )
        if twin is not source:
            raise UsageError(
                f"variants '{twin.name}' and '{source.name}' are the same "
                f"{'folder' if is_folder else 'model'} {source.origin}"
            )
    return sources


def _split(model: str) -> tuple[str | None, str]:
    name, equals, folder = model.partition("=")
    return (name, folder) if equals and "/" not in name else (None, model)


def parse_hub_ref(model: str) -> HubRef | None:
    """Read `ORG/NAME[@REVISION]`; None where it is not one."""
    match = _HUB_REF.fullmatch(model)
    # What the hub itself refuses as a name, or what leads somewhere else as a path.
    if match is None or ".." in model or "--" in match["repo"] or model.endswith((".git", "/")):
        return None
    return HubRef(match["repo"], match["revision"] or "main")


def _source(name: str | None, model: str) -> Source:
    if not model:
        raise UsageError(f"'{name or ''}=' names no model; write NAME=MODEL")
    if name is not None and not valid_variant_name(name):
        raise UsageError(f"{ascii(name[:80])} is not a variant name: {NAME_RULES}")
    origin = _origin(model)
    if name is None:
        # The name as typed, so that a link called "latest" is "latest"; "." and ".." are resolved.
        name = (
            Path(os.path.abspath(origin)).name  # noqa: PTH100 - resolve() would follow links
            if isinstance(origin, Path)
            else origin.repo.partition("/")[2]
        )
        if not valid_variant_name(name):
            raise UsageError(
                f"{model}: the folder's name {ascii(name[:80])} cannot be a variant name "
                f"({NAME_RULES}); give one with NAME={model}"
            )
    return Source(name, origin)


def _origin(model: str) -> Path | HubRef:
    path = Path(model)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir() raises for a name that is too long
        return path
    there = os.path.lexists(path)
    if not there and (ref := parse_hub_ref(model)):
        return ref
    problem = "not a folder" if there else "no such folder"
    raise CheckpointError(
        f"{model}: {problem}; MODEL must be a checkpoint folder or ORG/NAME[@REVISION] on the hub"
    )

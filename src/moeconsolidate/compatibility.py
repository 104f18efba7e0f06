"""Whether checkpoints can share a pack: one architecture, differing in weights only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.sources import parse_hub_ref
from moeruntime.errors import CheckpointError
from moeruntime.tensorfile import dtype_name

__all__ = ["check_compatible", "warn_of_different_bases"]

_log = logging.getLogger(__name__)


def check_compatible(checkpoints: Sequence[Checkpoint]) -> None:
    """Hold every checkpoint against the first.

    Raises:
        CheckpointError: the first difference, naming both folders, the field and both values.
    """
    first, *others = checkpoints
    for other in others:
        kinds = first.family.model_type, other.family.model_type
        pairs: list[tuple[str, object, object]] = [("config.json: model_type", *kinds)]
        pairs += [
            (
                f"config.json: {first.family.config_keys.get(field.name, field.name)}",
                getattr(first.config, field.name),
                getattr(other.config, field.name),
            )
            for field in fields(first.config)
            if len(set(kinds)) == 1
        ]
        pairs.append(
            ("dtype of the experts", dtype_name(first.expert_dtype), dtype_name(other.expert_dtype))
        )
        for what, ours, theirs in pairs:
            if ours != theirs:
                raise CheckpointError(
                    f"{first.folder} and {other.folder} cannot share a pack: {what} is "
                    f"{_shown(ours)} and {_shown(theirs)}"
                )


def warn_of_different_bases(checkpoints: Sequence[Checkpoint]) -> None:
    """Log a warning where variants say that they were made from different models of the hub.

    They fit all the same, but their experts may be alike nowhere. A folder's name says nothing: it
    may be a copy of the same model.
    """
    own = {checkpoint.origin.repo for checkpoint in checkpoints if checkpoint.origin}
    named = [one for one in checkpoints if parse_hub_ref(one.base) and one.base not in own]
    for other in named[1:]:
        if other.base != named[0].base:
            _log.warning(
                "%s says it is made from %s and %s from %s; of different bases little can be "
                "shared: `moec plan` tells how much, --align may help",
                named[0].name,
                named[0].base,
                other.name,
                other.base,
            )
            return


def _shown(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)

"""Whether checkpoints can share a pack: one architecture, differing in weights only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from moeconsolidate.checkpoint import Checkpoint
from moeruntime.errors import CheckpointError
from moeruntime.tensorfile import dtype_name

__all__ = ["check_compatible"]


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


def _shown(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)

"""What `moec eval --json` printed, read back: for a report, or for a model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from moeruntime.errors import InputError
from moeruntime.strict_json import Fields, read_json

__all__ = ["MAX_ENTRIES", "ScoreRow", "bounded", "read_scores"]

MAX_ENTRIES = 1000


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """A variant's loss on a text; NLL in nats per token, of the original where it is known."""

    variant: str
    data: str
    num_tokens: int
    nll: float
    original_nll: float | None


def read_scores(path: Path, names: Sequence[str]) -> list[ScoreRow]:
    """Read what `moec eval --json` printed.

    Raises:
        InputError: malformed, or it scores a variant that is not among `names`.
    """
    rows = []
    for entry in bounded(read_json(path, InputError).children("scores"), path):
        if (variant := entry.text("model")) not in names:
            entry.fail(f"{ascii(variant[:80])} is not a variant of this pack")
        original = entry.number("reference_nll", 0, 1e6) if entry.has("reference_nll") else None
        rows.append(
            ScoreRow(
                variant,
                PurePath(entry.text("data")).name,
                entry.integer("tokens", 1, 2**62),
                entry.number("nll", 0, 1e6),
                original,
            )
        )
    return rows


def bounded(entries: list[Fields], path: Path) -> list[Fields]:
    """Refuse lists that are empty, or longer than anybody would want to look at."""
    if not 1 <= len(entries) <= MAX_ENTRIES:
        raise InputError(f"{path}: {len(entries)} entries, outside 1..{MAX_ENTRIES}")
    return entries

"""The options of the compiler's commands, and what their values mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from moeruntime.errors import UsageError

__all__ = [
    "Align",
    "Budget",
    "CalibrationTexts",
    "Code",
    "Json",
    "MaxLoss",
    "Merge",
    "Models",
    "PackArgument",
    "Quiet",
    "SharedBits",
    "Signal",
    "Similarity",
    "Threshold",
    "pairs_of",
    "texts_of",
]

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress on stderr.")]
Models = Annotated[
    list[str],
    typer.Argument(
        metavar="[NAME=]MODEL",
        help="A checkpoint folder in Hugging Face layout; at least two. The variant is called "
        "NAME, or else as its folder is.",
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        show_default="0.9",
        help="Similarity, 0 to 1, from which experts share a slot. At 1.0 only bit-identical "
        "experts do, and nothing is lost.",
    ),
]
Similarity = Annotated[
    str | None,
    typer.Option(
        show_default="cosine",
        help="How experts are compared: cosine, or cka (linear centred kernel alignment), which "
        "does not see rotations.",
    ),
]
Signal = Annotated[
    str | None,
    typer.Option(
        show_default="weights; with --align activations",
        help="What is compared: weights, or activations: what experts answer to the same inputs, "
        "taken from every variant's calibration text or else from text it writes itself.",
    ),
]
Align = Annotated[
    bool,
    typer.Option(
        "--align",
        help="For variants without a common ancestor: bring the neurons of experts that share a "
        "slot into the same order first, which changes nothing of what they compute.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What experts may take: a part of separate models' experts, such as 0.25x, or bytes, "
        "such as 60GB. Private bits are then chosen expert by expert, to lose least.",
    ),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="Instead of a budget: the predicted loss of the worst variant, nats per token.",
    ),
]
CalibrationTexts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE",
        help='Text of a variant, JSONL with one {"text": ...} a line (an encoder-decoder: '
        '{"input": ..., "target": ...}), that tells what matters; '
        "may be given several times for one. Without any, where some is needed, text that the "
        "variants write themselves takes its place.",
    ),
]
Code = Annotated[
    str | None,
    typer.Option(
        help="nested: shared bits and a few private ones for each variant. plain: one merged "
        "expert as it is. Default: plain with --merge and at threshold 1.0, nested otherwise."
    ),
]
SharedBits = Annotated[
    int | None,
    typer.Option(
        show_default="4",
        help="Bits of a weight that nested codes share, 2 to 6; fewer fit smaller budgets.",
    ),
]
Merge = Annotated[
    str | None,
    typer.Option(
        metavar="RULE",
        help="How one plain expert is made of those that share a slot: average, first, "
        "frequency-weighted, regmean, round-robin, task-arithmetic or ties. These are published, "
        "and there to compare with: nested codes lose far less. Where a rule has a base, it is the "
        "first model.",
    ),
]
PackArgument = Annotated[Path, typer.Argument(metavar="PACK", help="A pack's folder.")]


def pairs_of(option: str, values: Sequence[str]) -> list[tuple[str, Path]]:
    """Split NAME=PATH values."""
    pairs = []
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or not name or not path:
            raise UsageError(f"{option} '{value}' is not NAME=PATH")
        pairs.append((name, Path(path)))
    return pairs


def texts_of(values: Sequence[str] | None) -> dict[str, list[Path]]:
    """Read the values of --calibration: variant -> files."""
    texts: dict[str, list[Path]] = {}
    for name, path in pairs_of("--calibration", values or []):
        texts.setdefault(name, []).append(path)
    return texts

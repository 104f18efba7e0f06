"""The options of the compiler's commands, and what their values mean."""

from __future__ import annotations

import json
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
    "RecipeFile",
    "SharedBits",
    "Signal",
    "Similarity",
    "Threshold",
    "pairs_of",
    "print_json",
    "texts_of",
]

Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="For programs: one JSON object on stdout in place of tables; and on stderr one a line "
        "for each event: progress, warning, error.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress on stderr.")]
Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME=]MODEL",
        show_default=False,
        help="A checkpoint folder in Hugging Face layout, or ORG/NAME[@REVISION] on the hub; at "
        "least two. The variant is called NAME, or else as its folder or repository is.",
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="A TOML file with any of these options, called as they are called here: "
        'models = ["base=org/base", "math=math"], threshold = 0.8, ... What is given on the '
        "command line goes before what is in it; paths in it are relative to it.",
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


def print_json(value: object) -> None:
    """Print the result of a command that was asked for JSON."""
    typer.echo(json.dumps(value, indent=2))


def pairs_of(option: str, values: Sequence[str]) -> list[tuple[str, Path]]:
    """Split NAME=PATH values."""
    pairs = []
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or not name or not path:
            raise UsageError(f"{option} '{value}' is not NAME=PATH")
        pairs.append((name, Path(path)))
    return pairs


def once(option: str, pairs: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """NAME=PATH values of an option that takes one for each name."""
    for name, _ in pairs:
        if sum(one == name for one, _ in pairs) > 1:
            raise UsageError(f"{option} is given twice for '{name}'")
    return dict(pairs)


def texts_of(values: Sequence[str] | None) -> dict[str, list[Path]]:
    """Read the values of --calibration: variant -> files."""
    texts: dict[str, list[Path]] = {}
    for name, path in pairs_of("--calibration", values or []):
        texts.setdefault(name, []).append(path)
    return texts

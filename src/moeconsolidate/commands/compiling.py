"""Commands that start from checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeconsolidate.options import (
    Align,
    Budget,
    CalibrationTexts,
    Code,
    Json,
    MaxLoss,
    Merge,
    Models,
    Quiet,
    RecipeFile,
    SharedBits,
    Signal,
    Similarity,
    Threshold,
    print_json,
    texts_of,
)
from moeconsolidate.startup import undisturbed_imports
from moeruntime.errors import InputError, UsageError

if TYPE_CHECKING:
    from moeconsolidate.plan import ConsolidationPlan

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command()(consolidate)
    app.command(name="plan")(make_plan)


def consolidate(
    models: Models = None,
    *,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="PACK", help="The folder to make; must not exist."),
    ],
    recipe: RecipeFile = None,
    threshold: Threshold = None,
    similarity: Similarity = None,
    signal: Signal = None,
    align: Align = False,
    budget: Budget = None,
    max_loss: MaxLoss = None,
    calibration: CalibrationTexts = None,
    code: Code = None,
    shared_bits: SharedBits = None,
    merge: Merge = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Execute a plan that `moec plan` wrote; it holds the choices of all other options "
            "but --calibration.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile checkpoints into one pack.

    The checkpoints must agree in architecture and differ in weights only: fine-tunes of one base
    model. Layer by layer, experts that are alike across variants share a slot, which holds what
    they have in common; each variant keeps a few bits of each, its router, attention and
    embeddings. The pack appears when it is whole.

    \b
    Examples:
      moec consolidate mini-base mini-math --out pack
      moec consolidate base=mini-base math=mini-math --threshold 1.0 --out pack
      moec consolidate base=org/base math=org/math@v2 --out pack
      moec consolidate --recipe recipe.toml --out pack --json
    """
    with undisturbed_imports():
        from moeconsolidate.console import print_summary, progress
        from moeconsolidate.pipeline import consolidate as compile_pack
        from moeconsolidate.recipe_file import read_request
        from moeconsolidate.report import summarise
        from moeruntime.pack import Pack

    request = read_request(
        recipe,
        models,
        calibration=texts_of(calibration),
        threshold=threshold,
        similarity=similarity,
        signal=signal,
        align=align or None,
        merge=merge,
        code=code,
        shared_bits=shared_bits,
        budget=budget,
        max_loss=max_loss,
    )
    if plan is not None and request.choices:
        raise UsageError(
            "--plan has every choice in it; of the options that choose, give --calibration alone"
        )
    with progress(quiet=quiet, as_json=as_json) as on_progress:
        result = compile_pack(
            request.models,
            out,
            **request.choices,
            calibration=request.calibration,
            plan=None if plan is None else _read_plan(plan),
            on_progress=on_progress,
        )
    with Pack(result.pack) as pack:
        summary = summarise(pack)
    if as_json:
        print_json({"pack": str(result.pack), **summary.to_json()})
    else:
        print_summary(summary)


def make_plan(
    models: Models = None,
    *,
    recipe: RecipeFile = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write the plan there, as JSON."),
    ] = None,
    threshold: Threshold = None,
    similarity: Similarity = None,
    signal: Signal = None,
    align: Align = False,
    budget: Budget = None,
    max_loss: MaxLoss = None,
    calibration: CalibrationTexts = None,
    code: Code = None,
    shared_bits: SharedBits = None,
    merge: Merge = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Look at headers only, and say what it would take: bytes to download, disk, "
            "memory, time.",
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Decide what `consolidate` would do, and write no pack.

    Shows which experts would share slots, how many bits each would get, the bytes that takes and
    the loss that is predicted. `moec consolidate --plan FILE` executes exactly that. Comparing
    needs the weights, so models of the hub are downloaded; --dry-run downloads none.

    \b
    Example:
      moec plan base=org/base math=org/math --dry-run
      moec plan base=mini-base math=mini-math --budget 0.4x --out plan.json
      moec consolidate base=mini-base math=mini-math --plan plan.json --out pack
    """
    with undisturbed_imports():
        from moeconsolidate.console import print_estimate, print_plan, progress
        from moeconsolidate.dry_run import dry_run as estimate_of
        from moeconsolidate.pipeline import make_plan as decide
        from moeconsolidate.publish import write_file
        from moeconsolidate.recipe_file import read_request
        from moeruntime.strict_json import canonical_json

    if dry_run and out is not None:
        raise UsageError("--dry-run decides nothing that --out could hold; leave one out")
    if out is not None and os.path.lexists(out):
        raise UsageError(f"{out}: exists already; remove it or choose another name")
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder for {out.name}")
    request = read_request(
        recipe,
        models,
        calibration=texts_of(calibration),
        threshold=threshold,
        similarity=similarity,
        signal=signal,
        align=align or None,
        merge=merge,
        code=code,
        shared_bits=shared_bits,
        budget=budget,
        max_loss=max_loss,
    )
    if dry_run:
        estimate = estimate_of(request.models, request.choices, request.calibration)
        if as_json:
            print_json(estimate.to_json())
        else:
            print_estimate(estimate)
        return
    with progress(quiet=quiet, as_json=as_json) as on_progress:
        plan = decide(
            request.models,
            **request.choices,
            calibration=request.calibration,
            on_progress=on_progress,
        )
    if out is not None:
        write_file(out, canonical_json(plan.to_json()))
    if as_json:
        print_json(plan.to_json())
    else:
        print_plan(plan)


def _read_plan(path: Path) -> ConsolidationPlan:
    from moeconsolidate.plan import ConsolidationPlan
    from moeruntime.strict_json import read_json

    return ConsolidationPlan.from_json(read_json(path, InputError))

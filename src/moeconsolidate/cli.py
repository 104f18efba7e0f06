"""The `moec` command: what it accepts, what it prints, and what it exits with.

Commands import what they need when they are called: `moec --help` loads neither torch nor SciPy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

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
    PackArgument,
    Quiet,
    SharedBits,
    Signal,
    Similarity,
    Threshold,
    pairs_of,
    texts_of,
)
from moeconsolidate.process import run_and_exit
from moeruntime import __version__
from moeruntime.cli import Artifact, Device, Dtype, Resident, register
from moeruntime.errors import InputError, UsageError

if TYPE_CHECKING:
    from moeconsolidate.plan import ConsolidationPlan

__all__ = ["app", "main"]

app = typer.Typer(
    name="moec",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moec {__version__}")
        raise typer.Exit


@app.callback()
def moec(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Store and serve fine-tuned mixture-of-experts models together.

    `consolidate` compiles checkpoints of one architecture into a pack, which holds experts that are
    alike once; `run` generates text from any variant in it; `export` gets a variant out again.

    \b
    Example:
      moec consolidate base=mini-base math=mini-math --out pack
      moec inspect pack
      moec run --artifact pack --model math --prompt "What is 3 + 4?" --chat
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(UsageError.exit_code)


@app.command()
def consolidate(
    models: Models,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="PACK", help="The folder to make; must not exist."),
    ],
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
    """
    from moeconsolidate.console import print_summary, progress
    from moeconsolidate.pipeline import consolidate as compile_pack
    from moeconsolidate.report import summarise
    from moeruntime.pack import Pack

    bits = (budget, max_loss, code, shared_bits)
    decided = (threshold, similarity, signal, align or None, merge, *bits)
    if plan is not None and any(one is not None for one in decided):
        raise UsageError(
            "--plan has every choice in it; of the options that choose, give --calibration alone"
        )
    with progress(quiet=quiet) as on_progress:
        result = compile_pack(
            models,
            out,
            threshold=threshold,
            similarity=similarity,
            signal=signal,
            align=align,
            merge=merge,
            code=code,
            shared_bits=shared_bits,
            budget=budget,
            max_loss=max_loss,
            calibration=texts_of(calibration),
            plan=None if plan is None else _read_plan(plan),
            on_progress=on_progress,
        )
    with Pack(result.pack) as pack:
        summary = summarise(pack)
    if as_json:
        _print_json({"pack": str(result.pack), **summary.to_json()})
    else:
        print_summary(summary)


@app.command(name="plan")
def make_plan(
    models: Models,
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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Decide what `consolidate` would do, and write no pack.

    Shows which experts would share slots, how many bits each would get, the bytes that takes and
    the loss that is predicted. `moec consolidate --plan FILE` executes exactly that.

    \b
    Example:
      moec plan base=mini-base math=mini-math --budget 0.4x --out plan.json
      moec consolidate base=mini-base math=mini-math --plan plan.json --out pack
    """
    from moeconsolidate.console import print_plan, progress
    from moeconsolidate.pipeline import make_plan as decide
    from moeconsolidate.publish import write_file
    from moeruntime.strict_json import canonical_json

    if out is not None and os.path.lexists(out):
        raise UsageError(f"{out}: exists already; remove it or choose another name")
    with progress(quiet=quiet) as on_progress:
        plan = decide(
            models,
            threshold=threshold,
            similarity=similarity,
            signal=signal,
            align=align,
            merge=merge,
            code=code,
            shared_bits=shared_bits,
            budget=budget,
            max_loss=max_loss,
            calibration=texts_of(calibration),
            on_progress=on_progress,
        )
    if out is not None:
        write_file(out, canonical_json(plan.to_json()))
    if as_json:
        _print_json(plan.to_json())
    else:
        print_plan(plan)


@app.command()
def inspect(pack: PackArgument, as_json: Json = False) -> None:
    """Show a pack's variants, who shares which experts, and what that saves.

    Reads the manifest and the headers of the files; `moec verify` reads everything.

    \b
    Examples:
      moec inspect pack
      moec inspect pack --json | jq .expert_ratio
    """
    from moeconsolidate.console import print_sharing, print_summary
    from moeconsolidate.report import summarise
    from moeruntime.pack import Pack

    with Pack(pack) as opened:
        summary = summarise(opened)
    if as_json:
        _print_json(summary.to_json())
    else:
        print_summary(summary)
        print_sharing(summary)


@app.command()
def verify(pack: PackArgument, as_json: Json = False, quiet: Quiet = False) -> None:
    """Check every byte of a pack against its manifest.

    Exits with 5 on the first thing that is not as the manifest says: a digest, a size, a reference,
    a file too few or too many.

    \b
    Example:
      moec verify pack && echo whole
    """
    from moeconsolidate.console import progress
    from moeconsolidate.plan import Progress
    from moeruntime.pack import Manifest, verify_pack

    total = len(Manifest.load(pack).files) if pack.is_dir() else 0
    sizes: list[int] = []
    with progress(quiet=quiet) as on_progress:

        def count(_path: str, num_bytes: int) -> None:
            sizes.append(num_bytes)
            on_progress(Progress("files", len(sizes), total))

        manifest = verify_pack(pack, on_file=count)
    if as_json:
        _print_json({"files": len(sizes), "bytes": sum(sizes), "variants": manifest.variant_names})
    else:
        typer.echo(
            f"{pack}: whole: {len(sizes)} files, {sum(sizes)} bytes, all as the manifest says"
        )


@app.command()
def export(
    pack: PackArgument,
    model: Annotated[str, typer.Option("--model", "-m", metavar="NAME", help="The variant.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", help="The folder to make."),
    ],
    max_shard_bytes: Annotated[
        int, typer.Option(min=1, help="Tensor bytes a file may hold.")
    ] = 5_000_000_000,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one variant as a plain Hugging Face checkpoint.

    transformers and vLLM load the result. From a pack made with --threshold 1.0 it is the model
    that went in, bit by bit.

    \b
    Example:
      moec export pack --model math --out math-again
    """
    from moeconsolidate.console import progress
    from moeconsolidate.export import export_variant

    with progress(quiet=quiet) as on_progress:
        folder = export_variant(
            pack, model, out, max_shard_bytes=max_shard_bytes, on_progress=on_progress
        )
    files = sorted(path.name for path in folder.iterdir())
    if as_json:
        _print_json({"folder": str(folder), "model": model, "files": files})
    else:
        typer.echo(f"{folder}: {model}, {len(files)} files")


@app.command(name="eval")
def evaluate(
    artifact: Artifact,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FILE",
            help='Texts to score a variant on, JSONL with one {"text": ...} a line, or for '
            'encoder-decoders {"input": ..., "target": ...}; may be given '
            "several times, also for one variant.",
        ),
    ],
    reference: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="The checkpoint a variant was made from, to compare with on the same texts.",
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Score this many windows of each text; default: all.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resident: Resident = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how well each variant of a pack predicts text, and what the pack costs it.

    Prints the mean negative log-likelihood (NLL, nats per token) and perplexity; with --reference
    also the increase over the original checkpoint, evaluated by the same engine.

    \b
    Example:
      moec eval --artifact pack --data math=math.jsonl --reference math=mini-math
    """
    from moeconsolidate.console import print_scores, progress
    from moeconsolidate.evaluation import evaluate_pack

    with progress(quiet=quiet) as on_progress:
        rows = evaluate_pack(
            artifact,
            pairs_of("--data", data),
            dict(pairs_of("--reference", reference or [])),
            context=context,
            max_windows=windows,
            on_progress=on_progress,
            engine_options={"device": device, "dtype": dtype, "resident": resident},
        )
    if as_json:
        _print_json({"context": context, "scores": [row.to_json() for row in rows]})
    else:
        print_scores(rows)


@app.command()
def report(
    pack: PackArgument,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The HTML file to make.")
    ],
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `moec eval --json` printed: adds each loss."),
    ] = None,
    curve: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A JSON list of {method, bytes, worst, mean}, bytes of experts against separate "
            "models': adds the curve of loss against bytes.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw a pack as one HTML file: sizes, sharing, precision and similarity of experts.

    The file needs no network and nothing beside it. Reads every expert once. Needs matplotlib: pip
    install 'moec[report]'.

    \b
    Examples:
      moec report pack --out report.html
      moec eval --artifact pack --data math=math.jsonl --json > scores.json
      moec report pack --scores scores.json --out report.html
    """
    from dataclasses import asdict

    from moeconsolidate.console import progress
    from moeconsolidate.html_report import read_curve, read_scores, render_report
    from moeconsolidate.publish import check_target, write_file
    from moeruntime.pack import Pack

    check_target(out, inputs=[pack])
    with Pack(pack) as opened, progress(quiet=quiet) as on_progress:
        page, layers = render_report(
            opened,
            scores=read_scores(scores, opened.manifest.variant_names) if scores else (),
            curve=read_curve(curve) if curve else (),
            on_progress=on_progress,
        )
    contents = page.encode("utf-8")
    write_file(out, contents)
    if as_json:
        _print_json(
            {
                "report": str(out),
                "bytes": len(contents),
                "similarity": [asdict(layer) for layer in layers],
            }
        )
    else:
        typer.echo(f"{out}: {len(contents)} bytes")


register(app)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `moec` and exit; without arguments, take them from the command line."""
    run_and_exit(app, arguments)


def _read_plan(path: Path) -> ConsolidationPlan:
    from moeconsolidate.plan import ConsolidationPlan
    from moeruntime.strict_json import read_json

    return ConsolidationPlan.from_json(read_json(path, InputError))


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))

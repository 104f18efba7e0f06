"""Commands that start from a finished pack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeconsolidate.options import Json, PackArgument, Quiet, once, pairs_of, print_json
from moeruntime.cli import Artifact, Device, Dtype, Resident

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command()(inspect)
    app.command()(verify)
    app.command()(sign)
    app.command()(export)
    app.command(name="eval")(evaluate)
    app.command()(report)
    app.command()(push)


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
        print_json(summary.to_json())
    else:
        print_summary(summary)
        print_sharing(summary)


def verify(
    pack: PackArgument,
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A public key: check also that its owner signed this."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check every byte of a pack against its manifest.

    Exits with 5 on the first thing that is not as the manifest says: a digest, a size, a reference,
    a file too few or too many; and with --key if nobody signed these files, or somebody else did.

    \b
    Examples:
      moec verify pack && echo whole
      moec verify pack --key public.pem
    """
    from moeconsolidate.console import progress
    from moeconsolidate.plan import Progress
    from moeruntime.pack import Manifest, verify_pack

    total = len(Manifest.load(pack).files) if pack.is_dir() else 0
    sizes: list[int] = []
    with progress(quiet=quiet, as_json=as_json) as on_progress:

        def count(_path: str, num_bytes: int) -> None:
            sizes.append(num_bytes)
            on_progress(Progress("files", len(sizes), total))

        manifest = verify_pack(pack, on_file=count)
    if key is not None:
        from moeconsolidate.signing import check_signature

        check_signature(pack, key)
    if as_json:
        print_json({"files": len(sizes), "bytes": sum(sizes), "variants": manifest.variant_names})
    else:
        typer.echo(
            f"{pack}: whole: {len(sizes)} files, {sum(sizes)} bytes, all as the manifest says"
        )


def sign(
    pack: PackArgument,
    key: Annotated[
        Path,
        typer.Option(metavar="FILE", help="An elliptic curve's private key, unencrypted PEM."),
    ],
    as_json: Json = False,
) -> None:
    """Sign a pack, so that `moec verify --key` can tell who made it.

    Checks the pack first. Needs model-signing: pip install 'moec[sign]'.

    \b
    Example:
      openssl ecparam -name prime256v1 -genkey -noout -out private.pem
      openssl ec -in private.pem -pubout -out public.pem
      moec sign pack --key private.pem
      moec verify pack --key public.pem
    """
    from moeconsolidate.signing import sign_pack

    signature = sign_pack(pack, key)
    if as_json:
        print_json({"pack": str(pack), "signature": str(signature)})
    else:
        typer.echo(f"{signature}: signed")


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

    with progress(quiet=quiet, as_json=as_json) as on_progress:
        folder = export_variant(
            pack, model, out, max_shard_bytes=max_shard_bytes, on_progress=on_progress
        )
    files = sorted(path.name for path in folder.iterdir())
    if as_json:
        print_json({"folder": str(folder), "model": model, "files": files})
    else:
        typer.echo(f"{folder}: {model}, {len(files)} files")


def evaluate(
    artifact: Artifact,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FILE",
            help='Texts to score a variant on, JSONL with one {"text": ...} a line, or for '
            'encoder-decoders {"input": ..., "target": ...}; may be given several times, also for '
            "one variant.",
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

    with progress(quiet=quiet, as_json=as_json) as on_progress:
        rows = evaluate_pack(
            artifact,
            pairs_of("--data", data),
            once("--reference", pairs_of("--reference", reference or [])),
            context=context,
            max_windows=windows,
            on_progress=on_progress,
            engine_options={"device": device, "dtype": dtype, "resident": resident},
        )
    if as_json:
        print_json({"context": context, "scores": [row.to_json() for row in rows]})
    else:
        print_scores(rows)


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
    with Pack(pack) as opened, progress(quiet=quiet, as_json=as_json) as on_progress:
        page, layers = render_report(
            opened,
            scores=read_scores(scores, opened.manifest.variant_names) if scores else (),
            curve=read_curve(curve) if curve else (),
            on_progress=on_progress,
        )
    contents = page.encode("utf-8")
    write_file(out, contents)
    if as_json:
        print_json(
            {
                "report": str(out),
                "bytes": len(contents),
                "similarity": [asdict(layer) for layer in layers],
            }
        )
    else:
        typer.echo(f"{out}: {len(contents)} bytes")


def push(
    pack: PackArgument,
    target: Annotated[
        str, typer.Argument(metavar="ORG/NAME[@BRANCH]", help="The repository on the hub.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    base_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORG/NAME",
            help="A model on the hub that the pack was made of, where it does not know that "
            "itself; may be given several times.",
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What `moec eval --json` printed: goes into the model card."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a pack to the hub, with a model card.

    Checks the pack first, as `moec verify` does. The card says what the pack was made of, by which
    recipe, and what was measured. All files appear in one commit. Needs HF_TOKEN, or a login with
    `hf auth login`.

    \b
    Examples:
      moec push pack org/pack
      moec push pack org/pack --private --scores scores.json
    """
    from moeconsolidate.console import progress
    from moeconsolidate.hub.upload import push_pack
    from moeconsolidate.scores import read_scores
    from moeruntime.pack import Manifest

    measured = read_scores(scores, Manifest.load(pack).variant_names) if scores else []
    with progress(quiet=quiet, as_json=as_json) as on_progress:
        url = push_pack(
            pack,
            target,
            private=private,
            base_models=base_model or [],
            scores=measured,
            on_progress=on_progress,
        )
    if as_json:
        print_json({"pack": str(pack), "commit": url})
    else:
        typer.echo(url)

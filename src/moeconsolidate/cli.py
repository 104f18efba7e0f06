"""The `moec` command: what it accepts, what it prints, and what it exits with.

Commands import what they need when they are called: `moec --help` loads neither torch nor SciPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from moeconsolidate.commands import compiling, packs
from moeconsolidate.process import run_and_exit
from moeruntime import __version__
from moeruntime.cli import register
from moeruntime.errors import UsageError

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


for group in (compiling, packs):
    group.register(app)
register(app)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `moec` and exit; without arguments, take them from the command line."""
    run_and_exit(app, arguments)

"""`moec serve`: the command line of the server."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeruntime.cli import Artifact, Device, Dtype, KeptLayers, Resident
from moeruntime.errors import UsageError

if TYPE_CHECKING:
    from moeruntime.engine import Engine
    from moeruntime.pack import Pack
    from moeruntime.qos import FairShare

__all__ = ["serve"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DAY_S = 86_400.0


def _finite(seconds: float) -> float:
    """Refuse what is no number, which is neither too small nor too large."""
    if not math.isfinite(seconds):
        raise typer.BadParameter(f"{seconds} is no number of seconds")
    return seconds


def _seconds(text: str, *, least: float = 0.01) -> Any:
    """An option that is a time of up to a day."""
    return typer.Option(metavar="SECONDS", min=least, max=DAY_S, callback=_finite, help=text)


def serve(
    artifact: Artifact,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file with a key that every request must bring, /health excepted: "
            "'Authorization: Bearer KEY'. A browser may give it as a password.",
        ),
    ] = None,
    qos: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML with targets: ttft_s, tpot_s and weight under [default] and under "
            "[variants.NAME].",
        ),
    ] = None,
    ttft: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0.001,
            show_default="1",
            help="Target of the time to the first token, where the file has none.",
        ),
    ] = None,
    tpot: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0.001,
            show_default="0.1",
            help="Target of the time per token, where the file has none.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resident: Resident = None,
    kept_layers: KeptLayers = None,
    max_sequences: Annotated[
        int, typer.Option(min=1, help="Sequences that run at once; on CUDA at most 256.")
    ] = 64,
    max_step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step.")] = 2048,
    max_queue: Annotated[
        int,
        typer.Option(
            min=1,
            help="Sequences of one variant that may wait for their first token; more get a 429.",
        ),
    ] = 128,
    max_wait: Annotated[
        float,
        _seconds("A request that waits longer gets a 429 as well."),
    ] = 60.0,
    request_timeout: Annotated[
        float,
        _seconds("A request may take so long in all."),
    ] = 600.0,
    drain_timeout: Annotated[
        float,
        _seconds(
            "On SIGTERM or Ctrl-C, requests under way get so long to finish; new ones get a 503. "
            "A second signal ends it at once.",
            least=0.0,
        ),
    ] = 30.0,
    max_body_mib: Annotated[
        int, typer.Option(min=1, max=64, help="Size of a request's body, in MiB.")
    ] = 8,
    body_timeout: Annotated[
        float,
        _seconds("For a body to arrive."),
    ] = 20.0,
    header_timeout: Annotated[
        float,
        _seconds("For headers to arrive, and for idle connections."),
    ] = 10.0,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Log nothing but warnings and errors.")
    ] = False,
) -> None:
    """Serve every variant of a pack over HTTP, the way OpenAI's API does.

    `model` names the variant. Variants share every step, and no variant's flood holds up the
    others: each has a share of the device by weight, and its requests have deadlines. A page for
    people is at /, numbers for Prometheus at /metrics.

    \b
    Examples:
      moec serve --artifact pack
      moec serve --artifact pack --host 0.0.0.0 --api-key-file key --resident 2 --qos qos.toml
      curl localhost:8000/v1/completions -H 'content-type: application/json' \\
        -d '{"model": "math", "prompt": "Tom has", "max_tokens": 20}'
    """
    try:
        from moeruntime.server.run import serve_pack
    except ModuleNotFoundError as problem:
        raise UsageError(
            f"{problem.name} is missing; install the extra: pip install 'moec[serve]'"
        ) from None
    from moeruntime.pack import Manifest
    from moeruntime.qos import Targets, read_targets
    from moeruntime.server.desk import Limits
    from moeruntime.server.guard import read_key
    from moeruntime.server.logs import set_up_logging

    key = None if api_key_file is None else read_key(api_key_file)
    names = Manifest.load(artifact).variant_names
    default = Targets()
    default = Targets(ttft or default.ttft_s, tpot or default.tpot_s, default.weight)
    set_up_logging(quiet=quiet)

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    def open_engine(pack: Pack, waiting: FairShare) -> Engine:
        from moeruntime.engine import Engine

        return Engine(
            pack,
            device=device,
            dtype=dtype,
            resident=resident,
            kept_layers=kept_layers,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            waiting=waiting,
        )

    if key is None and host not in LOOPBACK:
        say(f"warning: {host} can be reached by others, and there is no --api-key-file")
    serve_pack(
        artifact,
        open_engine,
        host=host,
        port=port,
        key=key,
        targets=read_targets(qos, names, default),
        limits=Limits(
            max_queue=max_queue,
            max_wait_s=max_wait,
            request_timeout_s=request_timeout,
            drain_s=drain_timeout,
            max_body_bytes=max_body_mib * 2**20,
            body_timeout_s=body_timeout,
            header_timeout_s=header_timeout,
        ),
        say=say,
    )

"""`moec serve`, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from moeruntime.engine import Engine
from moeruntime.pack import Pack, WeightSource, verify_pack
from moeruntime.prompts import Prompts
from moeruntime.qos import FairShare, Targets
from moeruntime.server.app import build_app
from moeruntime.server.desk import Desk, Limits
from moeruntime.server.loop import EngineLoop
from moeruntime.server.metrics import Metrics
from moeruntime.server.wire import listen, serve_forever

__all__ = ["serve", "serve_pack"]


def serve_pack(
    path: Path,
    open_engine: Callable[[Pack, FairShare], Engine],
    *,
    host: str,
    port: int,
    key: str | None,
    targets: Mapping[str, Targets],
    limits: Limits,
    say: Callable[[str], None],
) -> None:
    """Verify a pack, load it and serve it, until a signal ends it.

    Args:
        path: the pack's folder.
        open_engine: makes an engine of it, with the waiting room given; the engine owns the pack.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        key: what requests must bring; None asks for nothing.
        targets: of every variant.
        limits: how much to take on.
        say: told of progress.

    Raises:
        MoecError: the address is taken, the pack is not sound, or it does not fit; or the engine
            failed later on.
    """

    def open_verified(waiting: FairShare) -> Engine:
        say("verifying the pack")
        verify_pack(path)
        say("loading")
        pack = Pack(path)
        try:
            return open_engine(pack, waiting)
        except BaseException:
            pack.close()
            raise

    serve(
        Pack(path),
        open_verified,
        host=host,
        port=port,
        key=key,
        targets=targets,
        limits=limits,
        say=say,
    )


def serve(
    source: WeightSource,
    open_engine: Callable[[FairShare], Engine],
    *,
    host: str,
    port: int,
    key: str | None,
    targets: Mapping[str, Targets],
    limits: Limits,
    say: Callable[[str], None],
) -> None:
    """As `serve_pack`, for whatever an engine can be made of; `source` has the tokenizers."""
    manifest = source.manifest
    waiting = FairShare(targets)
    loop = EngineLoop(open_engine, waiting)
    desk = Desk(
        loop,
        manifest.variant_names,
        lambda: {name: Prompts(source, waiting.num_blocks) for name in manifest.variant_names},
        Metrics(loop, manifest.variant_names),
        limits,
    )
    sock = listen(host, port)
    address = sock.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    say(f"listening on http://{shown}:{address}")
    with sock:
        serve_forever(build_app(desk, manifest, key), desk, sock, lambda: say("ready"))

"""`moec run` and `moec bench`, and where `moec serve` is mounted: the runtime's command line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeruntime.errors import RequestError, TokenizerError, UsageError

if TYPE_CHECKING:
    from moeruntime.engine import Engine
    from moeruntime.pack import WeightSource
    from moeruntime.request import Output, Request

__all__ = ["Artifact", "Device", "Dtype", "KeptLayers", "Resident", "loading", "register"]

Artifact = Annotated[
    Path, typer.Option("--artifact", "-a", metavar="PACK", help="The pack's folder.")
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda or cuda:N; auto takes CUDA where there is one.")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16 or float16; auto is what the pack stores on CUDA, float32 on CPU."
    ),
]
Resident = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Variants whose own weights are on the device at once; the others are copied there "
        "when asked for. Default: all.",
    ),
]
KeptLayers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="With --resident: first layers of which every variant's weights stay on the device, "
        "so that a prompt to a cold variant begins at once. Default: one on a GPU where that is "
        "cheap.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the runtime's commands to an app."""
    from moeruntime.serve_cli import serve

    app.command()(run)
    app.command()(serve)
    app.command()(bench)


def run(
    artifact: Artifact,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME", help="The variant to ask.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="What to go on from.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Many prompts, one JSON object a line: {"model": ..., "prompt": ...}, and any of '
            "chat, max_tokens, temperature, top_p, top_k, seed, stop, which default to the "
            "options here. They run as mixed batches.",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the variant's chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Generate at most this many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; higher is more random.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens of this total probability.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Sample from this many likeliest tokens; 0 means all.")
    ] = 0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text; may be given several times."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resident: Resident = None,
    kept_layers: KeptLayers = None,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Run the beginning that prompts of one variant have in common only once.",
        ),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a prompt instead of text.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing on stderr.")] = False,
) -> None:
    """Generate text from one variant of a pack, or from many at once.

    Text streams to stdout as it comes. With --prompts, requests of different variants share every
    step, and answers are printed in the order of the file.

    \b
    Examples:
      moec run --artifact pack --model python --prompt "def fibonacci(n):"
      moec run --artifact pack --model math --chat --prompt "What is 3 + 4?" --json
      moec run --artifact pack --prompts questions.jsonl --resident 2
    """
    from moeruntime.prompt_file import read_prompts
    from moeruntime.request import Request, SamplingParams

    if (prompt is None) == (prompts is None):
        raise UsageError("give either --prompt TEXT or --prompts FILE")
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
    )
    places: list[str] = []
    if prompts is not None:
        places, requests = read_prompts(prompts, model, chat, sampling)
    else:
        requests = [Request(_named(artifact, model), prompt or "", sampling, chat)]
    with loading(
        artifact,
        device,
        dtype,
        resident,
        quiet=quiet,
        kept_layers=kept_layers,
        prefix_cache=prefix_cache,
    ) as engine:
        start_s = time.perf_counter()
        if prompts is None and not as_json:
            outputs = [_stream(engine, requests[0])]
        else:
            outputs = _generate(engine, requests, places)
            for request, output in zip(requests, outputs, strict=True):
                _print_output(request, output, as_json=as_json)
        if not quiet:
            _print_rate(outputs, time.perf_counter() - start_s)


def bench(
    artifact: Annotated[
        Path | None,
        typer.Option("--artifact", "-a", metavar="PACK", help="The pack's folder."),
    ] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            "--synthetic",
            metavar="MODEL",
            help="Instead of a pack: random weights, made on the device, at the size of "
            "mixtral-8x7b, mixtral-small, mixtral-mini or mixtral-tiny.",
        ),
    ] = None,
    variants: Annotated[
        int | None,
        typer.Option(
            "--variants",
            min=1,
            show_default="1",
            help="Of a synthetic model: how many variants.",
        ),
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(
            "--code",
            metavar="CODE",
            show_default="bf16",
            help="Of a synthetic model: how experts are stored, bf16 or the bits of shared and "
            "private codes, as 4+2.",
        ),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            show_default="1,8,32,64 on CUDA, 1,8 on CPU",
            help="Sequences that decode at once.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="512, or what the model takes",
            help="Tokens of each sequence while it decodes.",
        ),
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="2048, or what the model takes",
            help="Tokens of the long prompt whose prefill and first token are timed.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resident: Resident = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print nothing but the JSON object on stdout.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing on stderr.")] = False,
) -> None:
    """Measure this machine, each figure beside the best it could be.

    First what the device can do: how fast its memory is read, how fast a large product is, how fast
    pinned memory is copied. Then loading and memory, part by part; decode of one variant and of all
    mixed, against the time that the bytes of a step take to read (the roofline); prefill against
    the rate of the product; and the time to the first token of a variant, alone and right after
    another's request, and with --resident also cold.

    Prints a table, and all of it as one JSON object in the last line. A model that fits the caches
    of a CPU can beat a roofline that is made of its memory.

    \b
    Examples:
      moec bench --artifact pack
      moec bench --synthetic mixtral-8x7b --variants 4 --code 4+2 --batches 1,8,32,64
      moec bench --artifact pack --resident 1 --json | jq '.ttft'
    """
    if (artifact is None) == (synthetic is None):
        raise UsageError("give either --artifact PACK or --synthetic MODEL")
    if artifact is not None and (variants is not None or code is not None):
        raise UsageError("--variants and --code are for --synthetic; a pack has its own")
    from moeruntime.bench import BenchOptions, run_bench
    from moeruntime.pack import Pack
    from moeruntime.synthetic import SyntheticSource

    options = BenchOptions(
        batches=None if batches is None else _counts(batches, "--batches"),
        context=context,
        prompt=prompt,
        device=device,
        dtype=dtype,
        resident=resident,
    )
    source: WeightSource
    if artifact is not None:
        source = Pack(artifact)
    else:
        source = SyntheticSource(synthetic or "", num_variants=variants or 1, code=code or "bf16")
    with _status("measuring", quiet=quiet, every_line=True) as say:
        report = run_bench(source, options, say)
    if not as_json:
        print("\n".join(report.lines()), end="\n\n")
    print(json.dumps(report.to_json()))


@contextmanager
def loading(
    artifact: Path,
    device: str,
    dtype: str,
    resident: int | None,
    *,
    quiet: bool,
    kept_layers: int | None = None,
    prefix_cache: bool = True,
) -> Iterator[Engine]:
    """Load an engine, saying so on stderr, and close it at the end."""
    with _status(f"loading {artifact}", quiet=quiet) as say:
        from moeruntime.engine import Engine

        engine = Engine.from_pack(
            artifact,
            device=device,
            dtype=dtype,
            resident=resident,
            kept_layers=kept_layers,
            prefix_cache=prefix_cache,
            on_progress=say,
        )
    with engine:
        yield engine


def _named(artifact: Path, model: str | None) -> str:
    """The variant asked for; without one, the pack's names in the complaint."""
    if model is not None:
        return model
    from moeruntime.pack import Manifest

    names = ", ".join(Manifest.load(artifact).variant_names) if artifact.is_dir() else "NAME"
    raise UsageError(f"which variant? give --model with one of: {names}")


def _generate(engine: Engine, requests: list[Request], places: list[str]) -> list[Output]:
    """Run requests to the end; a complaint about one begins with the place it was read from."""
    if not places:
        return engine.generate(requests)
    last = ""

    def each() -> Iterator[Request]:
        nonlocal last
        for place, request in zip(places, requests, strict=True):
            last = place
            yield request

    try:  # The engine takes a request only after it has accepted the one before.
        return engine.generate(each())
    except (RequestError, TokenizerError) as problem:
        raise type(problem)(f"{last}: {problem}") from None


def _stream(engine: Engine, request: Request) -> Output:
    """Print text as it becomes certain."""
    output = None
    for delta in engine.stream(request):
        sys.stdout.write(delta.text)
        sys.stdout.flush()
        output = delta.output
    sys.stdout.write("\n")
    assert output is not None
    return output


def _print_output(request: Request, output: Output, *, as_json: bool) -> None:
    if not as_json:
        print(f"[{output.variant}] {output.text}")
        return
    record: dict[str, Any] = {
        "model": output.variant,
        "prompt": request.prompt,
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "usage": {
            "prompt_tokens": output.num_prompt_tokens,
            "completion_tokens": len(output.token_ids),
        },
    }
    print(json.dumps(record))


def _print_rate(outputs: list[Output], elapsed_s: float) -> None:
    num_tokens = sum(len(output.token_ids) for output in outputs)
    print(
        f"{num_tokens} tokens in {elapsed_s:.2f} s ({num_tokens / elapsed_s:.0f} tokens/s)",
        file=sys.stderr,
    )


def _counts(text: str, option: str) -> tuple[int, ...]:
    """Positive integers between commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10**6 for part in parts):
        raise UsageError(f"{option} takes counts like 1,8,32, not {ascii(text[:40])}")
    return tuple(sorted({int(part) for part in parts}))


@contextmanager
def _status(
    doing: str, *, quiet: bool, every_line: bool = False
) -> Iterator[Callable[[str], None]]:
    """A line that changes on a terminal; elsewhere one line, or each of them by itself."""
    if quiet:
        yield lambda line: None
    elif sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status(doing) as status:
            yield lambda line: status.update(f"{doing}: {line}")
    else:
        print(doing, file=sys.stderr)
        yield lambda line: print(f"  {line}", file=sys.stderr) if every_line else None

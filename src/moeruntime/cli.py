"""`moec run`: the runtime's part of the command line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeruntime.errors import InputError, RequestError, TokenizerError, UsageError
from moeruntime.strict_json import Fields, read_json_lines

if TYPE_CHECKING:
    from moeruntime.engine import Engine
    from moeruntime.request import Output, Request, SamplingParams

__all__ = ["Artifact", "Device", "Dtype", "Resident", "loading", "register"]

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


def register(app: typer.Typer) -> None:
    """Add the runtime's commands to an app."""
    app.command()(run)


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
        places, requests = _read_prompts(prompts, model, chat, sampling)
    else:
        requests = [Request(_named(artifact, model), prompt or "", sampling, chat)]
    with loading(artifact, device, dtype, resident, quiet=quiet) as engine:
        start_s = time.perf_counter()
        if prompts is None and not as_json:
            outputs = [_stream(engine, requests[0])]
        else:
            outputs = _generate(engine, requests, places)
            for request, output in zip(requests, outputs, strict=True):
                _print_output(request, output, as_json=as_json)
        if not quiet:
            _print_rate(outputs, time.perf_counter() - start_s)


@contextmanager
def loading(
    artifact: Path, device: str, dtype: str, resident: int | None, *, quiet: bool
) -> Iterator[Engine]:
    """Load an engine, saying so on stderr, and close it at the end."""
    with _loading_status(artifact, quiet=quiet) as say:
        from moeruntime.engine import Engine

        engine = Engine.from_pack(
            artifact, device=device, dtype=dtype, resident=resident, on_progress=say
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


def _read_prompts(
    path: Path, model: str | None, chat: bool, default: SamplingParams
) -> tuple[list[str], list[Request]]:
    """Read a file of prompts: where each of them stands, and what it asks for."""
    places, requests = [], []
    for fields in read_json_lines(path, InputError):
        places.append(fields.where)
        try:
            requests.append(_parse_request(fields, model, chat, default))
        except RequestError as problem:
            raise RequestError(f"{fields.where}: {problem}") from None
    if not requests:
        raise InputError(f"{path}: holds no prompt")
    return places, requests


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


def _parse_request(
    fields: Fields, model: str | None, chat: bool, default: SamplingParams
) -> Request:
    from moeruntime.request import Request, SamplingParams

    stop = fields.raw("stop", list(default.stop))
    if not isinstance(stop, list) or not all(isinstance(one, str) for one in stop):
        fields.fail("field 'stop' must be a list of strings")
    seed = fields.integer("seed", 0, 2**63) if fields.has("seed") else default.seed
    fields.raw("seed", None)
    request = Request(
        variant=fields.text("model", model),
        prompt=fields.text("prompt"),
        sampling=SamplingParams(
            max_tokens=fields.integer("max_tokens", 1, 2**31 - 1, default.max_tokens),
            temperature=fields.number("temperature", 0.0, 100.0, default.temperature),
            top_p=fields.number("top_p", 0.0, 1.0, default.top_p),
            top_k=fields.integer("top_k", 0, 2**31 - 1, default.top_k),
            seed=seed,
            stop=tuple(stop),
        ),
        chat=fields.boolean("chat", chat),
    )
    fields.done()
    return request


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


@contextmanager
def _loading_status(artifact: Path, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line that changes on a terminal; one line elsewhere."""
    if quiet:
        yield lambda line: None
    elif sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status(f"loading {artifact}") as status:
            yield lambda line: status.update(f"loading {artifact}: {line}")
    else:
        print(f"loading {artifact}", file=sys.stderr)
        yield lambda line: None

"""Many clients, some of whom leave in the middle, against `moec serve` on this machine.

Each client sends one request after the other, streamed or not, to a random variant; a part of them
hangs up after a random time, in whatever state the request is then. What is answered must be what
the engine says of that request alone; nothing may fail but with a 429; and in the end the server
must hold what it held at the beginning: no cache block, slot, thread or file more, and hardly any
memory.

Run: python benchmarks/serve_load.py --artifact PACK [--clients 64] [--seconds 300] [--record FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
from _common import print_json
from _serving import Server, serving
from _simulation import percentile

from moeruntime import Engine, Request, SamplingParams

LEAVING = 0.25
"""Part of the requests whose caller hangs up."""
MOST_PATIENT_S = 0.6
"""Callers who hang up do so within this time."""


@dataclass(frozen=True)
class Question:
    """A request, and what it is answered alone."""

    body: dict[str, Any]
    text: str
    num_prompt: int
    num_new: int


@dataclass
class Seen:
    """What the clients saw."""

    num_left: int = 0
    num_answered: int = 0
    num_busy: int = 0
    wrong: list[str] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    trace: list[tuple[float, str, int, int]] = field(default_factory=list)


def make_questions(pack: Path, count: int, seed: int) -> list[Question]:
    """Random requests to all variants, answered one by one in an engine of their own."""
    rng = random.Random(seed)
    questions = []
    with Engine.from_pack(pack, device="cpu", prefix_cache=False) as engine:
        manifest = engine.source.manifest
        for _ in range(count):
            variant = rng.choice(manifest.variant_names)
            prompt = [
                rng.randrange(3, manifest.config.vocab_size) for _ in range(rng.randint(2, 60))
            ]
            sampled = rng.random() < 0.5
            options = {"max_tokens": rng.randint(1, 24), "temperature": float(sampled), "seed": 7}
            (output,) = engine.generate([Request(variant, prompt, SamplingParams(**options))])
            body = {"model": variant, "prompt": prompt, **options}
            num_new = len(output.token_ids)
            questions.append(Question(body, output.text, len(prompt), num_new))
    return questions


async def put_load(
    server: Server, questions: Sequence[Question], *, clients: int, seconds: float, seed: int
) -> Seen:
    """Let clients ask until the time is over."""
    seen = Seen()
    start_s = time.monotonic()

    async def client(number: int) -> None:
        rng = random.Random(1000 * seed + number)
        while time.monotonic() - start_s < seconds:
            question = rng.choice(questions)
            patience_s = rng.uniform(0, MOST_PATIENT_S) if rng.random() < LEAVING else None
            streamed = rng.random() < 0.5
            asked = _ask(api, question, streamed, seen, time.monotonic() - start_s)
            try:
                async with asyncio.timeout(patience_s):
                    await asked
            except TimeoutError:
                seen.num_left += 1
            except openai.RateLimitError as problem:
                seen.num_busy += 1
                await asyncio.sleep(float(problem.response.headers["retry-after"]) * rng.random())

    async with (
        openai.AsyncOpenAI(
            base_url=server.url + "/v1", api_key="-", max_retries=0, timeout=120
        ) as api,
        asyncio.TaskGroup() as group,
    ):
        for number in range(clients):
            group.create_task(client(number))
    return seen


async def _ask(
    api: openai.AsyncOpenAI, question: Question, streamed: bool, seen: Seen, at_s: float
) -> None:
    start_s = time.monotonic()
    if streamed:
        parts: list[str] = []
        async with await api.completions.create(**question.body, stream=True) as stream:
            async for chunk in stream:
                if not parts:
                    seen.ttft_s.append(time.monotonic() - start_s)
                parts.append(chunk.choices[0].text)
        text = "".join(parts)
    else:
        answer = await api.completions.create(**question.body)
        text = answer.choices[0].text
    seen.num_answered += 1
    seen.num_tokens += question.num_new
    seen.trace.append(
        (round(at_s, 3), question.body["model"], question.num_prompt, question.num_new)
    )
    if text != question.text:
        seen.wrong.append(f"{question.body}: {text!r}, alone {question.text!r}")


@dataclass(frozen=True)
class Held:
    """What a server's process holds."""

    rss_bytes: int
    num_threads: int
    num_files: int

    @classmethod
    def by(cls, server: Server) -> Held:
        process = psutil.Process(server.process.pid)
        return cls(process.memory_info().rss, process.num_threads(), process.num_fds())


def main() -> None:
    parser = argparse.ArgumentParser(description="Put load on moec serve, and check what it says.")
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--questions", type=int, default=80)
    parser.add_argument("--record", type=Path, default=None, help="write arrivals here")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    questions = make_questions(arguments.artifact, arguments.questions, arguments.seed)
    with serving(arguments.artifact, "--device", "cpu", "--resident", "2") as server:
        # What is allocated once, threads and buffers, is there after a while of the same load.
        def run(seconds: float, seed: int) -> Seen:
            return asyncio.run(
                put_load(server, questions, clients=arguments.clients, seconds=seconds, seed=seed)
            )

        run(min(20.0, arguments.seconds), arguments.seed + 1)
        server.wait_until_idle()
        before = Held.by(server)
        start_s = time.monotonic()
        seen = run(arguments.seconds, arguments.seed)
        taken_s = time.monotonic() - start_s
        server.wait_until_idle()
        after = Held.by(server)
        activations = server.stats()["activations"]
    if arguments.record is not None:
        lines = [json.dumps(list(one)) for one in sorted(seen.trace)]
        arguments.record.write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = {
        "benchmark": "serve_load",
        "clients": arguments.clients,
        "seconds": taken_s,
        "answered": seen.num_answered,
        "left": seen.num_left,
        "busy": seen.num_busy,
        "wrong": len(seen.wrong),
        "activations": activations,
        "tokens_per_s": seen.num_tokens / taken_s,
        "ttft_p50_s": percentile(seen.ttft_s, 0.5),
        "ttft_p99_s": percentile(seen.ttft_s, 0.99),
        "rss_growth_bytes": after.rss_bytes - before.rss_bytes,
        "threads_growth": after.num_threads - before.num_threads,
        "files_growth": after.num_files - before.num_files,
        "variants": dict(Counter(one[1] for one in seen.trace)),
    }
    for name, value in result.items():
        print(f"  {name:18s} {value}")
    for line in seen.wrong[:5]:
        print(line)
    print_json(result)


if __name__ == "__main__":
    main()

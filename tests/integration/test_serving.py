"""A server's life: full queues, floods of aborts, the end under load."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _serving import ROOT, START, Answered, Server, serving
from serve_load import Held, make_questions, put_load


@pytest.fixture
def threads() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        yield pool


def body(model: str = "math", **fields: Any) -> dict[str, Any]:
    long = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "temperature": 0}
    return {"model": model, **long, **fields}


def test_load_with_callers_who_leave(pack: Path) -> None:
    """Short; benchmarks/serve_load.py is the same for minutes."""
    questions = make_questions(pack, 24, seed=3)
    with serving(pack, "--device", "cpu", "--resident", "2", "--max-queue", "12") as server:

        def run(seconds: float, clients: int) -> Any:
            return asyncio.run(
                put_load(server, questions, clients=clients, seconds=seconds, seed=4)
            )

        run(1.0, 8)
        server.wait_until_idle()
        before = Held.by(server)
        seen = run(3.0, 24)
        server.wait_until_idle()
        after = Held.by(server)
        assert seen.wrong == []
        assert seen.num_answered > 20 and seen.num_left > 3
        assert after.num_threads <= before.num_threads + 2
        assert after.num_files <= before.num_files + 4
        assert after.rss_bytes - before.rss_bytes < 30_000_000
        assert "Traceback" not in server.log


def test_a_full_queue_says_when_to_come_back_and_only_to_its_own_variant(
    pack: Path, threads: concurrent.futures.ThreadPoolExecutor
) -> None:
    with serving(
        pack, "--device", "cpu", "--max-queue", "3", "--max-sequences", "4", "--max-wait", "30"
    ) as server:
        flood = [threads.submit(server.post, "/v1/completions", body()) for _ in range(20)]
        _wait_for_running(server, 1)
        other = server.post("/v1/completions", body("base", max_tokens=1))
        assert other.status == 200, other.body
        answers = [one.result() for one in flood]
        statuses = {one.status for one in answers}
        assert statuses == {200, 429}
        for one in answers:
            if one.status == 429:
                assert int(one.headers["retry-after"]) >= 1
                assert one.error["code"] == "queue_full"
        assert server.metric("moec:request_rejected_total", reason="queue_full") == sum(
            one.status == 429 for one in answers
        )
        never = server.post("/v1/completions", body("base", n=4, max_tokens=1))
        assert never.status == 400 and "at most 3" in never.error["message"]


def test_who_waits_too_long_is_told_so_and_who_takes_too_long_too(pack: Path) -> None:
    with serving(
        pack, "--device", "cpu", "--max-sequences", "1", "--max-wait", "0.3",
        "--request-timeout", "2",
    ) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:  # fmt: skip
        first = pool.submit(server.post, "/v1/completions", body(max_tokens=2000))
        _wait_for_running(server, 1)
        second = server.post("/v1/completions", body(max_tokens=1))
        assert (second.status, second.error["code"]) == (429, "waited_too_long")
        # Unless this machine was quick enough.
        assert first.result().status in (504, 200)
        server.wait_until_idle()


def test_sigterm_completes_or_refuses_each_request(
    pack: Path, threads: concurrent.futures.ThreadPoolExecutor
) -> None:
    with serving(pack, "--device", "cpu", "--max-sequences", "4") as server:
        asked = body(max_tokens=60)
        under_way = [
            threads.submit(server.post, "/v1/completions", asked | {"stream": number % 2 == 0})
            for number in range(12)
        ]
        _wait_for_running(server, 4)
        server.process.send_signal(signal.SIGTERM)
        late: list[Answered] = []
        while any(not one.done() for one in under_way):
            try:
                late.append(server.post("/v1/completions", asked))
            except OSError:
                break  # it has closed its door, which is seen
            time.sleep(0.01)
        for number, one in enumerate(under_way):
            answer = one.result()
            assert answer.status == 200
            if number % 2 == 0:
                assert answer.body.endswith(b"data: [DONE]\n\n")
                assert answer.body.count(b"data: {") > 2
            else:
                assert answer.json["usage"]["completion_tokens"] == 60
        refused = [one for one in late if one.status != 200]
        assert refused and all(one.error["code"] == "shutting_down" for one in refused)
        assert all("retry-after" in {key.lower() for key in one.headers} for one in refused)
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log


def test_without_time_to_finish_everybody_is_told(
    pack: Path, threads: concurrent.futures.ThreadPoolExecutor
) -> None:
    with serving(
        pack, "--device", "cpu", "--max-sequences", "2", "--drain-timeout", "0.2"
    ) as server:
        whole = [
            threads.submit(server.post, "/v1/completions", body(max_tokens=1900)) for _ in range(3)
        ]
        streams = threads.submit(server.post, "/v1/completions", body(max_tokens=1900, stream=True))
        _wait_for_running(server, 2)
        server.process.send_signal(signal.SIGTERM)
        for one in whole:
            assert (one.result().status, one.result().error["code"]) == (503, "shutting_down")
        told = streams.result()
        assert told.status == 503 or b'"code":"shutting_down"' in told.body
        assert server.process.wait(20) == 0


def test_a_pack_with_a_flipped_bit_is_not_served(pack: Path, tmp_path: Path) -> None:
    broken = tmp_path / "pack"
    shutil.copytree(pack, broken)
    victim = next((broken / "experts").iterdir())
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with serving(broken, "--device", "cpu", wait=False) as server:
        assert server.process.wait(30) == 5
        assert victim.name in server.lines[-1] and server.lines[-1].startswith("moec: error: ")


def test_a_port_that_is_taken_is_a_usage_error(pack: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-c", START, "serve", "-a", str(pack), "--port", str(port)],
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert f"port {port}" in done.stderr.splitlines()[-1]


def _wait_for_running(server: Server, count: int) -> None:
    deadline_s = time.monotonic() + 20
    while sum(one["running"] for one in server.stats()["variants"].values()) < count:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)

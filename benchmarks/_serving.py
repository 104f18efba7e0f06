"""A server in a process of its own, as users start it; tests and benchmarks share it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START = "import sys; from moeconsolidate.cli import main; sys.argv[0] = 'moec'; main()"


@dataclass
class Answered:
    """A response, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]  # type: ignore[no-any-return]


@dataclass
class Server:
    """A running `moec serve`."""

    process: subprocess.Popen[str]
    port: int
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=20_000))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def get(self, path: str, **headers: str) -> Answered:
        return self.send("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Answered:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, data, {"content-type": "application/json", **headers})

    def send(
        self, method: str, path: str, data: bytes | None, headers: Mapping[str, str]
    ) -> Answered:
        request = urllib.request.Request(
            self.url + path, data=data, headers=dict(headers), method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Answered(response.status, dict(response.headers), response.read())
        except urllib.error.HTTPError as problem:
            with problem:
                return Answered(problem.code, dict(problem.headers), problem.read())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def stats(self) -> Any:
        return self.get("/stats").json

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        total = 0.0
        for line in self.get("/metrics").body.decode().splitlines():
            head, _, value = line.rpartition(" ")
            if head.partition("{")[0] == name and all(
                f'{key}="{one}"' in head for key, one in labels.items()
            ):
                total += float(value)
        return total

    def wait_until_idle(self, timeout_s: float = 20) -> None:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            stats = self.stats()
            busy = sum(one["running"] + one["queued"] for one in stats["variants"].values())
            if busy == 0 and stats["cache_usage"] == 0:
                return
            time.sleep(0.02)
        raise AssertionError(f"still busy: {stats}")


@contextmanager
def serving(pack: Path, *options: str, wait: bool = True) -> Iterator[Server]:
    """Start `moec serve` on a free port; kill it at the end if it still runs."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", START, "serve", "--artifact", str(pack), "--port", "0", *options],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    server = Server(process, 0)
    reader = threading.Thread(target=_read, args=(server,), daemon=True)
    reader.start()
    try:
        _wait_for(server, "listening on ")
        server.port = int(next(x for x in server.lines if x.startswith("listening")).split(":")[-1])
        if wait:
            _wait_for(server, "ready")
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(5)
        assert process.stderr
        process.stderr.close()


def _read(server: Server) -> None:
    assert server.process.stderr
    for line in server.process.stderr:
        server.lines.append(line.rstrip("\n"))


def _wait_for(server: Server, start: str) -> None:
    deadline_s = time.monotonic() + 60
    while not any(line.startswith(start) for line in tuple(server.lines)):
        assert server.process.poll() is None, server.log
        assert time.monotonic() < deadline_s, server.log
        time.sleep(0.02)

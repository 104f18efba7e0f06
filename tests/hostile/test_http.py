"""Requests that are wrong, slow or large: one clear message each, and the server goes on."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _serving import Server, serving


@pytest.fixture(scope="module")
def server(pack: Path) -> Iterator[Server]:
    with serving(
        pack, "--device", "cpu", "--body-timeout", "1", "--header-timeout", "1", "--resident", "1"
    ) as running:
        yield running
        running.wait_until_idle()
        assert running.process.poll() is None
        assert "Traceback" not in running.log


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "math", "prompt": "a", "max_tokens": 1, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "math", "messages": [{"role": "user", "content": "a"}], **fields}


@pytest.mark.parametrize(
    "body", [b"42", b"null", b"[]", b"{{{", b"", b'"a"', b"\xff", b"[" * 10**5]
)
def test_bodies_that_are_no_object(server: Server, body: bytes) -> None:
    answer = server.post("/v1/completions", body)
    assert answer.status == 400
    assert answer.error["message"].startswith("body: ")
    assert answer.error["type"] == "invalid_request_error"


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        *[({"n": n}, "'n'") for n in (0, -1, 10**9, True, 1.0)],
        *[({"max_tokens": n}, "'max_tokens'") for n in (0, -1, 2**63)],
        *[({"temperature": n}, "temperature") for n in (-1, 1e9, "1")],
        *[({"top_p": n}, "top_p") for n in (-0.1, 0, 1.1)],
        *[({"temperature": n}, "is not JSON") for n in (NAN, INF, -INF)],
        *[({"logprobs": n}, "'logprobs'") for n in (-1, 10**6, True)],
        *[({"prompt": p}, "prompt") for p in ([], "", [[]], [""], None, 1, {}, [None], [[1], 2])],
        *[({"prompt": p}, "token id") for p in ([4096], [[1], [10**6]])],
        *[({"prompt": p}, "'prompt'") for p in ([-1], [2**70], [True], ["a"] * 129)],
        ({"prompt": [[1]] * 64, "n": 3}, "'n'"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": [1] * 3000}, "context"),
        *[({"stop": s}, "'stop'") for s in (["a"] * 10_000, "", [""], 5, [1])],
        ({"seed": "x"}, "'seed'"),
        ({"chat_template": "{{ 9**9999999 }}"}, "chat_template"),
        ({"logit_bias": {"99999999": 5}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"best_of": 4}, "best_of"),
        ({"stream": "yes"}, "'stream'"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"no_such_field": 1}, "no_such_field"),
    ],
)
def test_completions_that_are_wrong(server: Server, fields: dict[str, Any], said: str) -> None:
    answer = server.post("/v1/completions", completion(**fields))
    assert answer.status == 400, answer.body
    assert said in answer.error["message"]
    assert len(answer.error["message"]) < 1100 and "\n" not in answer.error["message"]


IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": []}, "'messages'"),
        ({"messages": "hello"}, "'messages'"),
        ({"messages": [{"role": "user"}]}, "'content'"),
        ({"messages": [{"role": "root", "content": "a"}]}, "'role'"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "only 'text'"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "tool_calls"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"tools": [{"type": "function", "function": {"name": 5}}]}, "tools"),
        ({"tools": "x"}, "tools"),
        ({"response_format": {"type": "json_schema", "json_schema": 1}}, "response_format"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_chats_that_are_wrong(server: Server, fields: dict[str, Any], said: str) -> None:
    answer = server.post("/v1/chat/completions", chat(**fields))
    assert answer.status == 400, answer.body
    assert said in answer.error["message"]


def test_an_image_is_never_fetched(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.3)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x"
        part = {"type": "image_url", "image_url": {"url": url}}
        server.post("/v1/chat/completions", chat(messages=[{"role": "user", "content": [part]}]))
        with pytest.raises(TimeoutError):
            trap.accept()


@pytest.mark.parametrize("name", ["nobody", "../math", "", "math\x00", "m" * 10**5])
def test_models_that_are_not_there(server: Server, name: str) -> None:
    answer = server.post("/v1/completions", completion(model=name))
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert "base, python, math, shell" in answer.error["message"]


def test_a_body_of_100_mb_is_refused_without_being_kept(server: Server) -> None:
    import psutil

    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    answer = server.post("/v1/completions", b" " * 100_000_000)
    assert answer.status == 413
    assert process.memory_info().rss - before < 40_000_000


def test_a_header_of_a_megabyte_is_refused(server: Server) -> None:
    with server.connect() as raw:
        try:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * 1_000_000 + b"\r\n\r\n")
        except (ConnectionResetError, BrokenPipeError):
            return  # told by the closed connection, while still writing
        with_answer = _read_all(raw)
    assert with_answer == b"" or b" 400 " in with_answer.split(b"\r\n")[0]


def test_slow_headers_and_slow_bodies_run_out_of_time(server: Server) -> None:
    with server.connect() as headers, server.connect() as body, server.connect() as idle:
        headers.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        body.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        start_s = time.monotonic()
        headers.settimeout(10)
        for _ in range(3):  # a byte now and then does not help
            time.sleep(0.2)
            headers.sendall(b"X")
        assert _read_all(headers) == b""
        assert b" 408 " in _read_all(body).split(b"\r\n")[0]
        assert _read_all(idle) == b""
        assert time.monotonic() - start_s < 8


def test_keys_that_come_twice_are_refused(server: Server) -> None:
    answer = server.post("/v1/completions", b'{"model": "math", "model": "base", "prompt": "a"}')
    assert answer.status == 400 and "duplicate key" in answer.error["message"]


def test_nobody_writes_lines_into_the_log(server: Server) -> None:
    with server.connect() as raw:
        raw.sendall(b"GET /a%0aFAKE%20LINE%1b[31m HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b" 404 " in _read_all(raw).split(b"\r\n")[0]
    time.sleep(0.1)
    assert "FAKE LINE" in server.log
    assert not any(line.startswith("FAKE") or "\x1b" in line for line in server.lines)
    assert r"\n" in next(line for line in server.lines if "FAKE" in line)


@pytest.mark.parametrize(
    "kind",
    ["multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "text/plain", ""],
)
def test_only_json_is_taken(server: Server, kind: str) -> None:
    answer = server.post("/v1/completions", completion(), **{"content-type": kind})
    assert answer.status == 415


def test_a_range_means_nothing(server: Server) -> None:
    answer = server.post("/v1/completions", completion(), range="bytes=0-1")
    assert answer.status == 200 and answer.json["choices"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("GET", "/docs", 404), ("GET", "/../../etc/passwd", 404)],
)
def test_routes_that_are_not_there(server: Server, method: str, path: str, status: int) -> None:
    answer = server.send(method, path, None, {})
    assert answer.status == status and answer.error["message"]


# -- callers who leave -------------------------------------------------------------------------


def _open(server: Server, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    data = json.dumps(body).encode()
    raw = server.connect()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    raw.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return raw


def _wait_for(server: Server, what: str, variant: str = "math") -> None:
    deadline_s = time.monotonic() + 20
    while not server.stats()["variants"][variant][what]:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


LONG = {"max_tokens": 1500, "ignore_eos": True}


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_while_running_gives_everything_back(server: Server, stream: bool) -> None:
    with _open(server, completion(stream=stream, **LONG)) as raw:
        _wait_for(server, "running")
        if stream:
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
    start_s = time.monotonic()
    server.wait_until_idle()
    assert time.monotonic() - start_s < 5, "it went on for nobody"


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_while_waiting_for_a_slot_gives_it_back(server: Server, stream: bool) -> None:
    with _open(server, completion(**LONG)):
        _wait_for(server, "running")
        with _open(server, completion(model="base", stream=stream, **LONG)):
            _wait_for(server, "queued", "base")
        deadline_s = time.monotonic() + 5
        while server.stats()["variants"]["base"]["queued"]:
            assert time.monotonic() < deadline_s
        assert server.stats()["variants"]["math"]["running"] == 1, "others go on"
    server.wait_until_idle()


def test_who_leaves_in_the_middle_of_a_prompt_gives_everything_back(server: Server) -> None:
    for delay_s in (0.0, 0.005, 0.02, 0.05):
        with _open(server, completion(prompt=[7] * 1900, stream=True, max_tokens=100)):
            time.sleep(delay_s)
    server.wait_until_idle()


def test_a_hundred_who_leave_at_random_moments_leave_nothing_behind(server: Server) -> None:
    def come_and_go(number: int) -> None:
        names = ("base", "python", "math", "shell")
        body = completion(model=names[number % 4], stream=number % 2 == 0, n=1 + number % 3, **LONG)
        with _open(server, body):
            time.sleep(0.002 * (number % 50))

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.wait_until_idle()
    assert server.post("/v1/completions", completion()).status == 200


def _read_all(raw: socket.socket) -> bytes:
    parts = []
    try:
        while part := raw.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)

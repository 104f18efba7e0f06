"""Calls that make no sense, ends that come early, and what is missing from the machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import tree_digests
from hostile.attacks import HELPERS, MOEC, edit_json, entries, one_line
from hostile.conftest import Moec, Refused

pytestmark = pytest.mark.timeout(60)

ASK = ("--prompt", "hi", "--max-tokens", "2", "--quiet")
KNOWN = "it has: a, b"


# -- consolidate, plan, export, eval ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threshold", "nan"], ["threshold nan is outside 0..1"]),
        (["--threshold", "inf"], ["threshold inf is outside 0..1"]),
        (["--threshold", "-0.1"], ["threshold -0.1 is outside 0..1"]),
        (["--threshold", "1.1"], ["threshold 1.1 is outside 0..1"]),
        (["--threshold", "0,9"], ["--threshold", "a valid number"]),
        (["--threshold", ""], ["--threshold", "a valid number"]),
        (["--threshold", "90%"], ["--threshold", "a valid number"]),
        (["--threshold"], ["--threshold", "requires an argument"]),
        (["--treshold", "0.9"], ["No such option", "--treshold"]),
        (["--code", "zip"], ["code 'zip' is unknown; known: "]),
        (["--budget", "lots"], ["'lots'"]),
        (["--budget", "-1"], ["-1"]),
        (["--budget", "nanx"], ["'nanx'"]),
        (["--budget", "1e999x"], ["1e999x"]),
        (["--budget", "infx"], ["'infx'"]),
        (["--budget", "1"], ["budget"]),
        (["--budget", "9" * 5000], ["budget"]),
        (["--max-loss", "nan"], ["max loss nan is outside 0..100"]),
        (["--max-loss", "-1"], ["max loss -1.0 is outside 0..100"]),
        (["--budget", "0.3x", "--max-loss", "1"], ["give a budget or a max loss, not both"]),
        (["--budget", "0.3x", "--code", "plain"], ["only nested codes have"]),
        (["--calibration", "a"], ["--calibration 'a' is not NAME=PATH"]),
    ],
    ids=lambda value: "86-" + "=".join(value)[:30] if value[0].startswith("--") else "",
)
def test_options(
    options: list[str], words: list[str], refused: Refused, models: Path, tmp_path: Path
) -> None:
    folders = [models / "a", models / "b"]
    refused(2, words, "consolidate", *folders, "--out", tmp_path / "out", "--quiet", *options)


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ([], 2, ["Missing argument '[NAME=]MODEL'"]),
        (["a"], 2, ["at least two models, got 1"]),
        (["a", "a"], 2, ["would both be called 'a'"]),
        (["a", "x=a"], 2, ["'a' and 'x' are the same folder a"]),
        (["a", "x=./b/../a"], 2, ["'a' and 'x' are the same folder"]),
        (["a", "link"], 2, ["'a' and 'link' are the same folder"]),
        (["a", "b", "shards", "x=b"], 2, ["'b' and 'x' are the same folder"]),
        (["a", "=b"], 2, ["'' is not a variant name"]),
        (["a", "x="], 2, ["names no model"]),
        (["a", "../x=b"], 3, ["../x=b: no such folder"]),
        (["a", "none/x/y"], 3, ["none/x/y: no such folder", "or ORG/NAME[@REVISION] on the hub"]),
        (["a", "https://example.org/model"], 3, ["no such folder"]),
        (["a", "a/config.json"], 3, ["a/config.json: not a folder"]),
        (["a", ""], 2, ["names no model"]),
        (["a", "\udcff"], 3, ["\\udcff: no such folder"]),
        (["a", "b\x1b[2J"], 3, ["b\\x1b[2J: no such folder"]),
    ],
    ids=lambda value: "87-" + " ".join(map(ascii, value)) if isinstance(value, list) else "",
)
def test_87_models(
    given: list[str],
    code: int,
    words: list[str],
    refused: Refused,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (models / "link").symlink_to("a")
    monkeypatch.chdir(models)
    refused(code, words, "consolidate", *given, "--out", tmp_path / "out", "--quiet")


TARGETS: dict[str, tuple[str, list[str]]] = {
    "88-inside-an-input": ("models/a/pack", ["lies inside the input", "models/a"]),
    "88-deep-inside-an-input": ("models/a/deep/pack", ["lies inside the input", "models/a"]),
    "88-inside-by-a-link": ("link/pack", ["link/pack: lies inside the input", "models/a"]),
    "88-inside-by-dots": ("models/b/../a/pack", ["lies inside the input", "models/a"]),
    "88-an-input": ("models/a", ["models/a: exists already"]),
    "88-folder-that-exists": ("pack", ["pack: exists already"]),
    "88-file-that-exists": ("pack/manifest.json", ["pack/manifest.json: exists already"]),
    "88-dangling-link": ("dangling", ["dangling: exists already"]),
    "88-parent-missing": ("none/pack", ["none is not an existing folder"]),
    "88-parent-a-file": ("pack/README.md/pack", ["README.md is not an existing folder"]),
    "88-dots": ("models/..", ["exists already"]),
}


@pytest.mark.parametrize("case", TARGETS)
def test_88_places_for_a_pack(case: str, refused: Refused, sandbox: Path) -> None:
    target, words = TARGETS[case]
    (sandbox / "models" / "a" / "deep").mkdir()
    (sandbox / "link").symlink_to("models/a")
    (sandbox / "dangling").symlink_to("nowhere")
    folders = [sandbox / "models" / "a", sandbox / "models" / "b"]
    refused(2, words, "consolidate", *folders, "--out", sandbox / target, "--quiet")


@pytest.mark.parametrize("command", ["consolidate", "export"])
def test_88_where_nothing_can_be_made(
    command: str, refused: Refused, sandbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {
        "consolidate": [sandbox / "models" / "a", sandbox / "models" / "b"],
        "export": [sandbox / "pack", "--model", "a"],
    }[command]
    refused(6, ["/proc"], command, *arguments, "--out", "/proc/out", "--quiet")

    def forbidden(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    words = [f"{tmp_path / 'out'}: cannot be written: Permission denied"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", forbidden)
        refused(6, words, command, *arguments, "--out", tmp_path / "out", "--quiet")


@pytest.mark.parametrize("command", ["consolidate", "export"])
def test_94_a_full_disk(
    command: str, refused: Refused, sandbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    arguments = {
        "consolidate": [sandbox / "models" / "a", sandbox / "models" / "b"],
        "export": [sandbox / "pack", "--model", "a"],
    }[command]
    words = [f"{tmp_path}: 0.000 GB free on this disk, 0.00"]
    refused(6, words, command, *arguments, "--out", tmp_path / "out", "--quiet")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.update(notes=""), ["unknown field 'notes'"]),
        (lambda plan: plan["recipe"].update(speed=1), ["recipe: unknown field 'speed'"]),
        (lambda plan: plan["recipe"].pop("merge"), ["recipe: field 'merge' is missing"]),
        (lambda plan: plan["recipe"].update(threshold=2), ["recipe: field 'threshold' is 2"]),
        (lambda plan: plan["recipe"].update(merge="magic"), ["merge 'magic' is unknown; known: "]),
        (
            lambda plan: plan["recipe"].update(alignment="no\nne"),
            ["alignment 'no\\nne' is unknown"],
        ),
        (lambda plan: plan.update(layers=5), ["field 'layers' must be a list"]),
        (lambda plan: plan["layers"][0].clear(), ["layers[0]"]),
    ],
    ids=[f"93-{number}" for number in range(8)],
)
def test_93_plans(
    change: Callable[[Any], object],
    words: list[str],
    moec: Moec,
    refused: Refused,
    models: Path,
    tmp_path: Path,
) -> None:
    folders, plan = [models / "a", models / "b"], tmp_path / "plan.json"
    assert moec("plan", *folders, "--out", plan, "--quiet")[0] == 0
    edit_json(plan, change)
    arguments = ["--plan", plan, "--out", tmp_path / "out", "--quiet"]
    refused(3, [str(plan), *words], "consolidate", *folders, *arguments)


def test_93_a_plan_of_other_models(
    moec: Moec, refused: Refused, models: Path, tmp_path: Path
) -> None:
    folders, plan = [models / "a", models / "b"], tmp_path / "plan.json"
    assert moec("plan", *folders, "--out", plan, "--quiet")[0] == 0
    edit_json(plan, lambda document: document["layers"].pop())
    arguments = ["--plan", plan, "--out", tmp_path / "out", "--quiet"]
    words = ["the plan has 1 layers, the models have 2"]
    refused(2, words, "consolidate", *folders, *arguments)


@pytest.mark.parametrize("contents", [None, b"", b"[]", b'{"a": 1, "a": 2}', b"{}"])
def test_93_plans_that_are_none(
    contents: bytes | None, refused: Refused, models: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    if contents is not None:
        plan.write_bytes(contents)
    folders = [models / "a", models / "b"]
    arguments = ["--plan", plan, "--out", tmp_path / "out", "--quiet"]
    refused(3, [str(plan)], "consolidate", *folders, *arguments)


def test_a_plan_is_not_overwritten(refused: Refused, models: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("precious")
    words = ["plan.json: exists already"]
    folders = [models / "a", models / "b"]
    refused(2, words, "plan", *folders, "--out", tmp_path / "plan.json", "--quiet")
    assert (tmp_path / "plan.json").read_text() == "precious"


# -- run and eval ----------------------------------------------------------------------------------


def test_unknown_variants(refused: Refused, bad_pack: Path, tmp_path: Path) -> None:
    for name in ("c", "A", "../a", "", "x" * 5000):
        words = [f"no variant {ascii(name[:80])}", KNOWN]
        refused(3, words, "run", "--artifact", bad_pack, "--model", name, *ASK)
    out = tmp_path / "out"
    refused(3, ["'c'", KNOWN], "export", bad_pack, "--model", "c", "--out", out, "--quiet")
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "hello hello"}\n')
    words = ["no variant 'c'", KNOWN]
    refused(3, words, "eval", "--artifact", bad_pack, "--data", f"c={data}", "--quiet")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "x"], ["give --model with one of: a, b"]),
        (["--model", "a"], ["give either --prompt TEXT or --prompts FILE"]),
        (["--model", "a", "--prompt", "x", "--prompts", "y"], ["give either --prompt"]),
        (["--model", "a", "--prompt", "x", "--resident", "0"], ["--resident"]),
        (["--model", "a", "--prompt", "x", "--kept-layers", "-1"], ["--kept-layers"]),
        (["--model", "a", "--prompt", "x", "--kept-layers", "99"], ["kept_layers is 99, outside"]),
        (["--model", "a", "--prompt", "x", "--device", "tpu"], ["device 'tpu' is not 'auto'"]),
        (["--model", "a", "--prompt", "x", "--device", "cpu:1"], ["device 'cpu:1' is not 'auto'"]),
        (["--model", "a", "--prompt", "x", "--device", "cuda:-1"], ["device 'cuda:-1' is not"]),
        (["--model", "a", "--prompt", "x", "--device", "cuda:\u0661"], ["is not 'auto'"]),
        (["--model", "a", "--prompt", "x", "--dtype", "int8"], ["dtype 'int8' is not one of"]),
        (
            ["--model", "a", "--prompt", "x", "--max-tokens", "many"],
            ["--max-tokens", "a valid integer"],
        ),
    ],
)
def test_calls_of_run_that_make_no_sense(
    arguments: list[str], words: list[str], refused: Refused, bad_pack: Path
) -> None:
    refused(2, words, "run", "--artifact", bad_pack, "--quiet", *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-tokens", "0"], ["max_tokens is 0, outside 1.."]),
        (["--max-tokens", "-1"], ["max_tokens is -1"]),
        (["--max-tokens", str(2**63)], ["max_tokens is 9223372036854775808"]),
        (["--temperature", "nan"], ["temperature is nan"]),
        (["--temperature", "inf"], ["temperature is inf"]),
        (["--temperature", "-1"], ["temperature is -1.0"]),
        (["--top-p", "0"], ["top_p is 0"]),
        (["--top-p", "1.5"], ["top_p is 1.5"]),
        (["--top-k", "-1"], ["top_k is -1"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--stop", ""], ["stop takes"]),
        ([f"--stop={n}" for n in range(17)], ["up to 16 strings"]),
        (["--prompt", "a\udcff"], ["lone surrogate"]),
        (["--prompt", "x " * 300], ["leaves no room in the context of 256"]),
    ],
)
def test_requests_no_engine_can_serve(
    arguments: list[str], words: list[str], refused: Refused, bad_pack: Path
) -> None:
    refused(3, words, "run", "--artifact", bad_pack, "--model", "a", *ASK, *arguments)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
        ),
        "cuda:64",
        "cuda:256",
        "cuda:999999999",
    ],
)
def test_95_a_device_that_is_absent(device: str, refused: Refused, bad_pack: Path) -> None:
    words = [f"device '{device}': this machine has "]
    arguments = ["--model", "a", "--device", device, *ASK]
    refused(6, words, "run", "--artifact", bad_pack, *arguments)


def test_95_a_device_that_is_too_small(
    refused: Refused, bad_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeruntime.memory.available_bytes", lambda _device: 1_000_000)
    words = [f"{bad_pack}: needs 0.3 GB on cpu, 0.0 GB are free"]
    arguments = ["--model", "a", "--device", "cpu", *ASK]
    refused(6, words, "run", "--artifact", bad_pack, *arguments)


GOOD = '{"model": "a", "prompt": "hi", "max_tokens": 1}\n'
PROMPTS: dict[str, tuple[str | bytes, list[str]]] = {
    "empty": ("", ["prompts.jsonl: holds no prompt"]),
    "blank": ("\n \n", ["prompts.jsonl: holds no prompt"]),
    "not-json": (GOOD + "hello\n", ["prompts.jsonl:2: not valid JSON"]),
    "list": (GOOD + "[1]\n", ["prompts.jsonl:2: must be a JSON object, not a list"]),
    "two-on-a-line": (GOOD.strip() * 2, ["prompts.jsonl:1: not valid JSON: Extra data"]),
    "not-utf8": (b'{"model": "a", "prompt": "\xff"}', ["prompts.jsonl:1: not UTF-8"]),
    "surrogate": (r'{"model": "a", "prompt": "\ud800"}', [":1: field 'prompt' holds a lone surr"]),
    "duplicate-key": ('{"model": "a", "model": "b"}', [":1: not valid JSON: duplicate key 'model"]),
    "unknown-field": ('{"model": "a", "prompt": "x", "n": 2}', [":1: unknown field 'n'"]),
    "no-prompt": (GOOD + '{"model": "a"}', [":2: field 'prompt' is missing"]),
    "no-model": ('{"prompt": "x"}', [":1: field 'model' is missing"]),
    "prompt-a-number": ('{"model": "a", "prompt": 5}', [":1: field 'prompt' must be a string"]),
    "prompt-empty": (GOOD * 2 + '{"model": "a", "prompt": "", "chat": false}', []),
    "unknown-variant": (GOOD + '{"model": "c", "prompt": "x"}', [":2: ", "'c'", KNOWN]),
    "tokens-0": ('{"model": "a", "prompt": "x", "max_tokens": 0}', [":1: field 'max_tokens' is 0"]),
    "top-p-0": ('{"model": "a", "prompt": "x", "top_p": 0}', [":1: top_p is 0, which leaves"]),
    "hot": ('{"model": "a", "prompt": "x", "temperature": 1e9}', [":1: field 'temperature' is 1"]),
    "nan": ('{"model": "a", "prompt": "x", "temperature": NaN}', [":1: not valid JSON: NaN is no"]),
    "stop-a-string": ('{"model": "a", "prompt": "x", "stop": "y"}', [":1: field 'stop' must be"]),
    "stop-empty": ('{"model": "a", "prompt": "x", "stop": [""]}', [":1: stop takes a tuple"]),
    "too-long": (
        GOOD + json.dumps({"model": "b", "prompt": "x y" * 300}),
        [":2: prompt of ", "leaves no room in the context of 256"],
    ),
}


@pytest.mark.parametrize("case", [case for case in PROMPTS if PROMPTS[case][1]])
def test_files_of_prompts(case: str, refused: Refused, bad_pack: Path, tmp_path: Path) -> None:
    contents, words = PROMPTS[case]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    words = [str(path), *words]
    refused(3, words, "run", "--artifact", bad_pack, "--prompts", path, "--quiet")


def test_an_empty_prompt_is_the_beginning_of_a_text(
    moec: Moec, bad_pack: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(str(PROMPTS["prompt-empty"][0]))
    assert moec("run", "--artifact", bad_pack, "--prompts", path, "--quiet")[0] == 0


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
@pytest.mark.parametrize("command", ["run", "eval"])
def test_files_that_are_none(
    kind: str, command: str, refused: Refused, bad_pack: Path, tmp_path: Path
) -> None:
    path = tmp_path / "file.jsonl"
    if kind == "folder":
        path.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    complaint = "no such file" if kind == "missing" else "not a regular file"
    arguments = {"run": ["--prompts", path], "eval": ["--data", f"a={path}"]}[command]
    words = [f"{path}: {complaint}"]
    refused(3, words, command, "--artifact", bad_pack, *arguments, "--quiet")


@pytest.mark.parametrize(
    ("contents", "options", "code", "words"),
    [
        ("", [], 3, ["texts.jsonl: holds no text"]),
        ('{"text": "a"}\n{"txt": "b"}', [], 3, ["texts.jsonl:2: field 'text' is missing"]),
        ('{"text": 5}', [], 3, ["texts.jsonl:1: field 'text' must be a string"]),
        ('{"text": "a b c"}', ["--context", "1"], 3, ["context 1 is outside 2..256"]),
        ('{"text": "a b c"}', ["--context", "257"], 3, ["context 257 is outside 2..256"]),
        ('{"text": "a b c"}', ["--windows", "0"], 2, ["--windows"]),
        ('{"text": "a b c"}', ["--data", "nonsense"], 2, ["'nonsense' is not NAME=PATH"]),
        ('{"text": "a b c"}', ["--reference", "b=/none"], 3, ["'b' has no data to be compared"]),
        ('{"text": "a b c"}', ["--reference", "a=/none"], 3, ["/none"]),
    ],
)
def test_calls_of_eval_that_make_no_sense(
    contents: str,
    options: list[str],
    code: int,
    words: list[str],
    refused: Refused,
    bad_pack: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(contents)
    arguments = ["--artifact", bad_pack, "--data", f"a={path}", "--context", 64, "--quiet"]
    refused(code, words, "eval", *arguments, *options)


# -- streams ---------------------------------------------------------------------------------------


def shell(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which "$@" is moec with some arguments."""
    call = ["bash", "-c", script, "bash", *MOEC, *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, check=False, timeout=50)


@pytest.mark.parametrize(
    ("script", "arguments", "code", "err"),
    [
        ('"$@" >&-', ["--version"], 0, ""),
        ('"$@" >/dev/full', ["--version"], 6, "moec: error: No space left on device\n"),
        ('"$@" | true; exit "${PIPESTATUS[0]}"', ["--help"], None, ""),
        ('"$@" 2>&-', ["unknown"], 2, ""),
        ('"$@" 2>/dev/full', ["unknown"], 2, ""),
        ('"$@" 2> >(exec 0<&-; sleep 1)', ["unknown"], 2, ""),
        ('"$@" <&-', ["--version"], 0, ""),
    ],
    ids=lambda value: f"91-{value}" if isinstance(value, str) and "$@" in value else "",
)
def test_91_streams_that_are_closed_or_full(
    script: str, arguments: list[str], code: int | None, err: str
) -> None:
    done = shell(script, *arguments)
    assert done.returncode == code or (code is None and done.returncode in (0, 1))
    assert "Traceback" not in done.stderr
    assert err in done.stderr


def test_91_a_pack_is_whole_though_nobody_listens(moec: Moec, models: Path, tmp_path: Path) -> None:
    """No file of the pack gets the number of a closed stream, and so none gets what is printed."""
    folders = [models / "a", models / "b"]
    done = shell('"$@" <&- >&- 2>&-', "consolidate", *folders, "--out", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert moec("verify", tmp_path / "out", "--quiet")[0] == 0


def test_91_no_escape_codes_without_a_terminal(moec: Moec, models: Path, tmp_path: Path) -> None:
    folders = [models / "a", models / "b"]
    code, out, err = moec("consolidate", *folders, "--out", tmp_path / "out")
    assert code == 0
    assert "experts: 1 of 2\n" in err
    assert "\x1b" not in out + err


# -- signals ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupt() -> Iterator[Callable[..., list[tuple[int, str]]]]:
    """interrupt([(place, signal), ...], "consolidate", ...): see interrupted_process.py."""
    process = subprocess.Popen(
        [sys.executable, str(HELPERS / "interrupted_process.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout

    def run(
        signals: list[tuple[str, int]], *arguments: object, copies: int = 1
    ) -> list[tuple[int, str]]:
        job = {"signals": signals, "arguments": [str(one) for one in arguments], "copies": copies}
        print(json.dumps(job), file=process.stdin, flush=True)
        return [(code, err) for code, err in json.loads(process.stdout.readline())]

    yield run
    process.communicate()


INT, TERM = int(signal.SIGINT), int(signal.SIGTERM)
FIRST, LAST = "experts: 1 of 2", "other weights: 1 of 2"


@pytest.mark.parametrize(
    "signals",
    [
        [("parsing", INT)],
        [("reading", INT)],
        [("writing", TERM)],
        [("flushing", INT)],
        [(FIRST, INT)],
        [(LAST, TERM)],
        [("reading", INT), ("cleaning", INT)],
        [("reading", TERM), ("cleaning", INT), ("exiting", INT)],
        [(FIRST, INT), (FIRST, INT)],
        [(FIRST, TERM), (FIRST, TERM), (FIRST, INT)],
    ],
    ids=lambda signals: "92-" + "-".join(f"{place.split(':')[0]}+{n}" for place, n in signals),
)
def test_92_signals_leave_nothing_broken(
    signals: list[tuple[str, int]],
    interrupt: Callable[..., list[tuple[int, str]]],
    moec: Moec,
    models: Path,
    bad_pack: Path,
    tmp_path: Path,
) -> None:
    """Finished layers are kept, if there are any, and said to be; the same call goes on there."""
    arguments = ["consolidate", models / "a", models / "b", "--out", tmp_path / "out"]
    [(code, err)] = interrupt(signals, *arguments)
    assert code == (130 if signals[0][1] == INT else 143), err
    said = [line for line in err.splitlines() if line.startswith("moec: ")]
    lines = [line for line in err.splitlines() if line not in said]
    assert all(line.startswith(("experts: ", "other weights: ")) for line in lines), err
    if FIRST in err or signals[0][0] == "flushing":
        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
        assert [line.split(";")[0] for line in said] in (
            [f"moec: warning: {n} finished layers are kept"] for n in (1, 2)
        )
        assert moec(*arguments)[0] == 0
        assert tree_digests(tmp_path / "out") == tree_digests(bad_pack)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    else:
        assert entries(tmp_path) == said == []


BUSY = """
import os, signal, threading, time
from concurrent.futures import ThreadPoolExecutor

import torch, typer
from moeconsolidate.process import run_and_exit

app, begun = typer.Typer(), threading.Event()

def work():
    begun.set()
    matrix, end = torch.randn(300, 300), time.monotonic() + 5
    while time.monotonic() < end:
        matrix @ matrix

def interrupt():
    begun.wait()
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)

@app.command()
def command():
    threading.Thread(target=interrupt).start()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work)

run_and_exit(app, [])
"""


def test_92_a_signal_while_a_thread_is_at_work_and_waited_for() -> None:
    command = [sys.executable, "-c", BUSY]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


@pytest.mark.parametrize("number", [INT, TERM])
def test_92_signals_while_generating(
    number: int, interrupt: Callable[..., list[tuple[int, str]]], bad_pack: Path
) -> None:
    arguments = ["--artifact", bad_pack, "--model", "a", *ASK]
    [(code, err)] = interrupt([("generating", number)], "run", *arguments)
    assert (code, err) == (128 + number, "")


def test_84_two_writers_of_one_pack(
    interrupt: Callable[..., list[tuple[int, str]]], moec: Moec, models: Path, tmp_path: Path
) -> None:
    """Whoever is first writes; the other is told, and touches nothing."""
    out = tmp_path / "out"
    arguments = ["consolidate", models / "a", models / "b", "--out", out, "--quiet"]
    answers = interrupt([], *arguments, copies=2)
    (loser,) = [err for code, err in answers if code == 2]
    assert sorted(code for code, _ in answers) == [0, 2]
    assert f"{out}: another moec is writing it; wait for that" in one_line(loser)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert moec("verify", out, "--quiet")[0] == 0

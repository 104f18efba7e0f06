"""The command: what it prints where, and what it exits with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import MakeCheckpoint, tree_digests
from moeconsolidate.cli import main
from moeruntime import __version__

Run = Callable[..., tuple[int, str, str]]
MOEC = [sys.executable, "-c", "from moeconsolidate.cli import main; main()"]


@pytest.fixture
def moec(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process; returns its exit code, stdout and stderr."""
    monkeypatch.delenv("MOEC_TRACEBACK", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as end:
                main([str(argument) for argument in arguments])
        finally:
            signal.signal(signal.SIGTERM, handler)
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, captured.out, captured.err

    return run


def one_line(stderr: str) -> str:
    assert stderr.startswith("moec: error: ")
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr
    return stderr


def test_help_and_version(moec: Run) -> None:
    code, out, _ = moec("--help")
    assert code == 0
    for command in ("consolidate", "inspect", "verify", "export", "run"):
        assert f"\n  {command} " in out
    assert moec("--version") == (0, f"moec {__version__}\n", "")
    for command in ("consolidate", "inspect", "verify", "export"):
        code, out, _ = moec(command, "--help")
        assert code == 0
        assert "Example" in out


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from moeconsolidate.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(done.stderr.split())
    assert "typer" in loaded
    assert not loaded & {"torch", "numpy", "scipy", "tokenizers", "rich.progress"}


def test_consolidate_prints_progress_on_stderr_and_a_table_on_stdout(
    moec: Run, checkpoints: dict[str, Path], pack: Path, tmp_path: Path
) -> None:
    models = [f"{name}={folder}" for name, folder in checkpoints.items()]
    code, out, err = moec("consolidate", *models, "--threshold", 0.9, "--out", tmp_path / "pack")
    assert code == 0
    assert "experts: 32 slots for 128" in out
    assert "25.8%" in out
    assert err.splitlines()[0] == "experts: 1 of 4"
    assert tree_digests(tmp_path / "pack") == tree_digests(pack)


def test_consolidate_for_machines(moec: Run, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    models = [checkpoints["base"], checkpoints["math"]]
    out_folder = tmp_path / "pack"
    code, out, err = moec("consolidate", *models, "--out", out_folder, "--json", "--quiet")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["pack"] == str(out_folder)
    assert [variant["name"] for variant in result["variants"]] == ["mini-base", "mini-math"]
    assert result["recipe"]["threshold"] == 0.9


def test_inspect(moec: Run, pack: Path, lossless_pack: Path) -> None:
    code, out, _ = moec("inspect", pack)
    assert code == 0
    assert "base = python = math = shell: 0 1 2 3 4 5 6 7" in out
    assert "math = shell: 7" in moec("inspect", lossless_pack)[1]
    code, out, _ = moec("inspect", pack, "--json")
    assert code == 0
    assert json.loads(out)["expert_ratio"] == 0.257812


def test_verify(moec: Run, pack: Path, tmp_path: Path) -> None:
    code, out, err = moec("verify", pack)
    assert code == 0
    assert "all as the manifest says" in out
    assert err.splitlines()[-1] == "files: 41 of 41"
    code, out, err = moec("verify", pack, "--json", "--quiet")
    assert (code, err) == (0, "")
    assert json.loads(out)["files"] == 41
    copy = tmp_path / "pack"
    shutil.copytree(pack, copy)
    with (copy / "README.md").open("r+b") as file:
        file.write(b"!")
    code, out, err = moec("verify", copy, "--quiet")
    assert (code, out) == (5, "")
    assert "README.md: sha256" in one_line(err)


def test_export(moec: Run, lossless_pack: Path, tmp_path: Path) -> None:
    folder = tmp_path / "math"
    code, out, err = moec("export", lossless_pack, "--model", "math", "--out", folder, "--json")
    assert code == 0
    assert "model.safetensors" in json.loads(out)["files"]
    assert len(err.splitlines()) == 10
    code, _, err = moec("export", lossless_pack, "--model", "maths", "--out", tmp_path / "x")
    assert code == 3
    assert "it has: base, python, math, shell" in one_line(err)


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["a"], 2, "at least two models"),
        (["a", "b", "--threshold", "nan"], 2, "threshold nan is outside 0..1"),
        (["a", "b", "--threshold", "-0.1"], 2, "threshold -0.1 is outside 0..1"),
        (["a", "b", "--threshold", "1.1"], 2, "threshold 1.1 is outside 0..1"),
        (["a", "x=a"], 2, "are the same folder"),
        (["a", "none"], 3, "none: no such folder"),
        (["a", "c"], 3, "cannot share a pack"),
        (["a", "b\n=b"], 2, "'b\\n' is not a variant name"),
        (["a", "b\nno"], 3, "b\\nno: no such folder"),
    ],
)
def test_bad_calls_end_in_one_line(
    moec: Run,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    complaint: str,
) -> None:
    make_checkpoint("a")
    make_checkpoint("b", seed=1)
    make_checkpoint("c", config={"vocab_size": 4100})
    monkeypatch.chdir(tmp_path)
    got, out, err = moec("consolidate", *arguments, "--out", "pack")
    assert (got, out) == (code, "")
    assert complaint in one_line(err)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["consolidate", "a", "b", "--out", "pack", "--threshold", "0,9"],
        ["consolidate", "a", "b"],
        ["consolidate", "--out", "pack"],
        ["export", "pack", "--model", "a", "--out", "x", "--max-shard-bytes", "0"],
        ["unknown"],
        ["inspect"],
    ],
)
def test_usage_errors_exit_with_2(moec: Run, arguments: list[str]) -> None:
    code, out, err = moec(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_bugs_end_in_one_line_too(moec: Run, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_pack: object) -> None:
        raise LookupError("unthinkable")

    monkeypatch.setattr("moeconsolidate.report.summarise", broken)
    code, _, err = moec("inspect", pack)
    assert code == 1
    assert "internal: LookupError: unthinkable (a bug in moec; MOEC_TRACEBACK=1" in one_line(err)
    monkeypatch.setenv("MOEC_TRACEBACK", "1")
    assert "Traceback (most recent call last)" in moec("inspect", pack)[2]


def test_what_the_system_refuses_is_no_bug(moec: Run) -> None:
    code, _, err = moec("inspect", "x" * 5000)
    assert code == 6
    assert "File name too long" in one_line(err)


def test_a_reader_that_goes_away_is_no_error_to_speak_of(pack: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            [*MOEC, "inspect", str(pack), "--json"],
            stdout=closed,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_no_pack(
    checkpoints: dict[str, Path], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The child gets the signal at its first line of progress, so in the middle of its work."""
    script = (
        "import os, sys\n"
        "from moeconsolidate import cli, console\n"
        f"console._counts = lambda step: os.kill(os.getpid(), {int(number)})\n"
        "cli.main(sys.argv[1:])\n"
    )
    models = [f"{name}={folder}" for name, folder in checkpoints.items()]
    arguments = ["consolidate", *models, "--out", str(tmp_path / "pack")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".pack.partial"]


def test_run_passes_on_how_weights_and_prompts_are_kept(
    moec: Run, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeruntime import Engine

    seen: list[dict[str, object]] = []
    from_pack = Engine.from_pack

    def spy(path: Path, **options: object) -> Engine:
        seen.append(options)
        return from_pack(path, **options)

    monkeypatch.setattr(Engine, "from_pack", spy)
    ask = ("run", "-a", pack, "-m", "math", "-p", "3 + 4 =", "--max-tokens", 4, "--device", "cpu")
    texts = {
        moec(*ask, "-q", *options)
        for options in ((), ("--resident", 1, "--kept-layers", 2, "--no-prefix-cache"))
    }
    assert len(texts) == 1
    assert [(o["resident"], o["kept_layers"], o["prefix_cache"]) for o in seen] == [
        (None, None, True),
        (1, 2, False),
    ]

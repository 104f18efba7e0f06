"""Sound models and a sound pack to spoil, and the one way a refusal must look.

Every case is called NUMBER-what: cases of one number are about one kind of bad input.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import TINY_CONFIG, random_tensors, save_shards
from hostile.attacks import one_line
from moeconsolidate.cli import main

COMMON_TENSOR = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="session")
def sound(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tiny checkpoints, `a` and `b`, `b` again in `shards`, and a pack of both."""

    from moeconsolidate import consolidate

    root = tmp_path_factory.mktemp("sound")
    common = random_tensors(TINY_CONFIG, 0)[COMMON_TENSOR]
    for name, seed, num_shards in (("a", 0, 0), ("b", 1, 0), ("shards", 1, 3)):
        (root / name).mkdir()
        tensors = random_tensors(TINY_CONFIG, seed) | {COMMON_TENSOR: common}
        save_shards(root / name, tensors, num_shards)
        (root / name / "config.json").write_text(json.dumps(TINY_CONFIG))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(checkpoints["math"] / file, root / name)
    consolidate([root / "a", root / "b"], root / "pack")
    return root


@pytest.fixture
def models(sound: Path, tmp_path: Path) -> Path:
    """A copy of the folder with the checkpoints."""
    root = tmp_path / "models"
    for name in ("a", "b", "shards"):
        shutil.copytree(sound / name, root / name)
    return root


@pytest.fixture
def bad_pack(sound: Path, tmp_path: Path) -> Path:
    """A copy of the pack of `a` and `b`, still sound."""
    return shutil.copytree(sound / "pack", tmp_path / "pack")


Moec = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


@pytest.fixture
def moec(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Moec:
    """Run the command in this process; returns its exit code, stdout and stderr.

    What libraries print past Python is captured as well.
    """
    monkeypatch.delenv("MOEC_TRACEBACK", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as end:
                main([str(argument) for argument in arguments])
        finally:
            signal.signal(signal.SIGTERM, handler)
        captured = capfd.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, captured.out, captured.err

    return run


@pytest.fixture
def refused(moec: Moec, tmp_path: Path) -> Refused:
    """Check that a command ends in one line with these words, and leaves nothing behind.

    refused(3, ["config.json", "hidden_size"], "consolidate", ...) returns the line.
    """

    def run(code: int, words: list[str], *arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        got, out, err = moec(*arguments)
        assert (got, out) == (code, ""), err
        line = one_line(err)
        for word in words:
            assert word in line
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


@pytest.fixture
def not_consolidated(refused: Refused, models: Path, tmp_path: Path) -> Refused:
    """Check that `models`/a and another folder of `models` (here b) are refused."""

    def run(words: list[str], *, other: str = "b", code: int = 3) -> str:
        folders = [models / "a", models / other]
        target = tmp_path / "out"
        return refused(code, words, "consolidate", *folders, "--out", target, "--quiet")

    return run

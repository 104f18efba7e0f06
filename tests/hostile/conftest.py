"""Sound models and a sound pack to spoil, and the one way a refusal must look.

Every case is called NUMBER-what: cases of one number are about one kind of bad input.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import typer

from helpers import TINY_CONFIG, random_tensors, save_shards
from hostile.attacks import Bounded, entries, one_line, restore
from moeconsolidate import cli

COMMON_TENSOR = "model.layers.0.self_attn.o_proj.weight"

Moec = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


@pytest.fixture(scope="session")
def sound(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[Path, bytes]]:
    """What `sandbox` holds: the folder, and the contents of each of its files."""
    from moeconsolidate import consolidate

    root = tmp_path_factory.mktemp("sandbox")
    common = random_tensors(TINY_CONFIG, 0)[COMMON_TENSOR]
    for name, seed, num_shards in (("a", 0, 0), ("b", 1, 0), ("shards", 1, 3)):
        folder = root / "models" / name
        folder.mkdir(parents=True)
        save_shards(folder, random_tensors(TINY_CONFIG, seed) | {COMMON_TENSOR: common}, num_shards)
        (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(checkpoints["math"] / file, folder)
    folders = [root / "models" / name for name in "ab"]
    consolidate(folders, root / "pack", code="nested")
    consolidate(folders, root / "plain", code="plain")
    return root, {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def sandbox(sound: tuple[Path, Mapping[Path, bytes]]) -> Iterator[Path]:
    """A folder to do harm in, which is put right after each test.

    `models` has two tiny checkpoints, a and b, and b once more in shards; `pack` and `plain` are a
    nested and a plain pack of a and b.
    """
    root, contents = sound
    yield root
    restore(root, contents)


@pytest.fixture
def models(sandbox: Path) -> Path:
    """The folder of checkpoints."""
    return sandbox / "models"


@pytest.fixture
def bad_pack(sandbox: Path) -> Path:
    """The nested pack, still sound."""
    return sandbox / "pack"


@pytest.fixture
def bad_plain_pack(sandbox: Path) -> Path:
    """The plain pack, still sound."""
    return sandbox / "plain"


@pytest.fixture(scope="session")
def parser() -> object:
    """The command line, taken from its functions' signatures once and not for every call."""
    return typer.main.get_command(cli.app)


@pytest.fixture
def moec(
    parser: object, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Moec:
    """Run the command in this process; returns its exit code, stdout and stderr.

    What libraries print past Python is captured as well.
    """
    monkeypatch.delenv("MOEC_TRACEBACK", raising=False)
    monkeypatch.setattr(cli, "app", parser)

    def run(*arguments: object) -> tuple[int, str, str]:
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as end:
                cli.main([str(argument) for argument in arguments])
        finally:
            signal.signal(signal.SIGTERM, handler)
        captured = capfd.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, captured.out, captured.err

    return run


@pytest.fixture
def refused(moec: Moec, sandbox: Path, tmp_path: Path) -> Refused:
    """Check that a command ends in one line with these words, and leaves nothing behind.

    refused(3, ["config.json", "hidden_size"], "consolidate", ...) returns the line.
    """

    def run(code: int, words: list[str], *arguments: object) -> str:
        before = entries(sandbox), entries(tmp_path)
        got, out, err = moec(*arguments)
        assert (got, out) == (code, ""), err
        line = one_line(err)
        for word in words:
            assert word in line
        assert (entries(sandbox), entries(tmp_path)) == before
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


@pytest.fixture(scope="session")
def bounded() -> Iterator[Bounded]:
    """bounded(extra_bytes, "consolidate", ...): a command in no more memory than that."""
    process = Bounded()
    yield process
    process.close()

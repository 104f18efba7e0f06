"""Real files for the tests: the bundled checkpoints, generated ones, and packs made from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import interpreter
from helpers import TINY_CONFIG, MakeCheckpoint, fuse, random_tensors, save_shards

interpreter.choose_interpreter()

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("base", "python", "math", "shell")


@pytest.fixture(scope="session")
def checkpoints() -> dict[str, Path]:
    """The bundled checkpoints, by variant name."""
    return {name: ROOT / "examples" / "checkpoints" / f"mini-{name}" for name in VARIANTS}


@pytest.fixture(scope="session")
def pack(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoints at threshold 0.9; copy it before you change it."""
    return _consolidate(checkpoints, tmp_path_factory, 0.9)


@pytest.fixture(scope="session")
def lossless_pack(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoints at threshold 1.0; copy it before you change it."""
    return _consolidate(checkpoints, tmp_path_factory, 1.0)


@pytest.fixture(scope="session")
def merged_pack(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoints at threshold 0.9, averaged; copy it before you change it."""
    return _consolidate(checkpoints, tmp_path_factory, 0.9, "plain")


def _consolidate(
    checkpoints: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    threshold: float,
    code: str | None = None,
) -> Path:
    from moeconsolidate import consolidate

    out = tmp_path_factory.mktemp("packs") / "pack"
    return consolidate(checkpoints, out, threshold=threshold, code=code).pack


@pytest.fixture
def make_checkpoint(tmp_path: Path, checkpoints: dict[str, Path]) -> MakeCheckpoint:
    """Write a small random Mixtral checkpoint: make_checkpoint("name", seed=1, fused=True, ...).

    Options: `seed`; `config`, entries to put into config.json; `tensors`, what to use in
    place of random weights; `edit`, a function that changes the dict of tensors in place; `fused`;
    `num_shards`, which adds an index; `parent`, a folder other than tmp_path.
    """

    def make(
        name: str,
        *,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        tensors: dict[str, Tensor] | None = None,
        edit: Callable[[dict[str, Tensor]], object] | None = None,
        fused: bool = False,
        num_shards: int = 0,
        parent: Path | None = None,
    ) -> Path:
        folder = (parent or tmp_path) / name
        folder.mkdir(parents=True)
        full_config = TINY_CONFIG | dict(config or {})
        tensors = dict(tensors) if tensors else random_tensors(full_config, seed)
        if fused:
            tensors = fuse(tensors)
        if edit:
            edit(tensors)
        (folder / "config.json").write_text(json.dumps(full_config))
        save_shards(folder, tensors, num_shards)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(checkpoints["base"] / file, folder)
        return folder

    return make

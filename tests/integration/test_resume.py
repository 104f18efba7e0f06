"""A consolidation that came to a bad end goes on where it was, if nothing has changed since."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crash import NUM_LAYERS, fail_everywhere, make_models
from helpers import MakeCheckpoint, tree_digests
from moeconsolidate import consolidate, texts
from moeconsolidate.layers import LayerReader
from moeconsolidate.pipeline import make_plan
from moeconsolidate.plan import Progress, default_code
from moeconsolidate.writer import PackWriter
from moeruntime.errors import CheckpointError, ResourceError, UsageError

TESTS = Path(__file__).resolve().parents[1]


class StoppedError(OSError):
    """Stands for a disk that fails."""


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_models(tmp_path_factory.mktemp("models"), checkpoints["base"])


@pytest.fixture(scope="module")
def expected(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "pack"
    consolidate(models, out)
    return tree_digests(out)


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that were decided anew, in place of being taken over."""
    layers: list[int] = []
    original = LayerReader.decide

    def spy(self: LayerReader, *args: Any) -> Any:
        layers.append(self._layer)
        return original(self, *args)

    monkeypatch.setattr(LayerReader, "decide", spy)
    return layers


def stop_after(num_layers: int) -> Callable[[Progress], None]:
    def on_progress(step: Progress) -> None:
        if (step.stage, step.done) == ("experts", num_layers):
            raise StoppedError("stopped")

    return on_progress


def stop(models: list[Path], target: Path, num_layers: int, **options: Any) -> Path:
    """Stop a consolidation after some layers; returns where its rest waits."""
    with pytest.raises(ResourceError, match="cannot be written: stopped"):
        consolidate(models, target, on_progress=stop_after(num_layers), **options)
    assert not target.exists()
    return target.parent / f".{target.name}.partial"


def little_calibration(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Text for both variants, of which hardly any is read."""
    for name, value in {"NUM_WINDOWS": 2, "NUM_HELD_OUT": 1, "WINDOW_TOKENS": 32}.items():
        monkeypatch.setattr(texts, name, value)
    words = folder / "words.jsonl"
    words.write_text('{"text": "the cat sat on the mat and looked at it"}\n' * 60)
    return {"calibration": {"a": [words], "b": [words]}}


def test_finished_layers_are_taken_over(
    models: list[Path], expected: dict[str, str], decided: list[int], tmp_path: Path
) -> None:
    stop(models, tmp_path / "pack", 4)
    decided.clear()
    seen: list[int] = []
    consolidate(models, tmp_path / "pack", on_progress=lambda step: seen.append(step.done))
    assert decided == [4, 5]
    assert seen[:NUM_LAYERS] == [1, 2, 3, 4, 5, 6]
    assert tree_digests(tmp_path / "pack") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def spoil(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)


SPOILT: dict[str, tuple[Callable[[Path], object], list[int]]] = {
    "a layer's file": (lambda one: spoil(one / "pack/experts/layer-001.safetensors"), [1, 4, 5]),
    "a private file": (lambda one: spoil(one / "pack/private/b/layer-002.safetensors"), [2, 4, 5]),
    "a lost file": (lambda one: (one / "pack/experts/layer-001.safetensors").unlink(), [1, 4, 5]),
    "half an entry": (
        lambda one: os.truncate(one / "journal" / "layer-003.json", 100),
        [3, 4, 5],
    ),
    "an entry of another layer": (
        lambda one: (one / "journal/layer-000.json").rename(one / "journal/layer-003.json"),
        [0, 3, 4, 5],
    ),
    "an entry that leads out": (
        lambda one: (one / "journal/layer-000.json").write_text(
            (one / "journal/layer-000.json").read_text().replace("experts/", "../../../x/")
        ),
        [0, 4, 5],
    ),
    "strays": (lambda one: (one / "pack" / "variants" / "stray").touch(), [4, 5]),
    "no journal": (
        lambda one: [path.unlink() for path in (one / "journal").iterdir()],
        [0, 1, 2, 3, 4, 5],
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_not_as_it_was_is_done_again(
    case: str, models: list[Path], expected: dict[str, str], decided: list[int], tmp_path: Path
) -> None:
    change, again = SPOILT[case]
    change(stop(models, tmp_path / "pack", 4))
    decided.clear()
    consolidate(models, tmp_path / "pack")
    assert decided == again
    assert tree_digests(tmp_path / "pack") == expected


@pytest.mark.parametrize(
    ("options", "again"),
    [({"threshold": 0.5}, NUM_LAYERS), ({"code": "plain"}, NUM_LAYERS), ({"shared_bits": 3}, 6)],
)
def test_another_recipe_begins_anew(
    options: dict[str, Any], again: int, models: list[Path], decided: list[int], tmp_path: Path
) -> None:
    stop(models, tmp_path / "pack", 4)
    decided.clear()
    consolidate(models, tmp_path / "pack", **options)
    assert len(decided) == again
    consolidate(models, tmp_path / "fresh", **options)
    assert tree_digests(tmp_path / "pack") == tree_digests(tmp_path / "fresh")


def test_other_weights_in_one_layer(
    make_checkpoint: MakeCheckpoint, decided: list[int], tmp_path: Path
) -> None:
    tensor = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    models = [make_checkpoint("a"), make_checkpoint("b", seed=1)]
    stop(models, tmp_path / "pack", 2)
    models[1] = make_checkpoint(
        "b", seed=1, edit=lambda all: all[tensor].mul_(2), parent=tmp_path / "x"
    )
    decided.clear()
    consolidate(models, tmp_path / "pack")
    assert decided == [0]
    consolidate(models, tmp_path / "fresh")
    assert tree_digests(tmp_path / "pack") == tree_digests(tmp_path / "fresh")


@pytest.mark.parametrize(
    "options", [{"merge": "regmean"}, {"align": True}, {"budget": "0.3x", "threshold": 0.0}]
)
def test_calibrated_layers_are_taken_over(
    options: dict[str, Any],
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = options | little_calibration(tmp_path, monkeypatch)
    written: list[int] = []
    original = PackWriter.note_layer

    def spy(self: PackWriter, key: str, recipe: Any, plan: Any) -> None:
        written.append(plan.layer)
        original(self, key, recipe, plan)

    monkeypatch.setattr(PackWriter, "note_layer", spy)
    stop(models, tmp_path / "pack", 4, **options)
    consolidate(models, tmp_path / "pack", **options)
    assert written == [0, 1, 2, 3, 4, 5]
    consolidate(models, tmp_path / "fresh", **options)
    assert tree_digests(tmp_path / "pack") == tree_digests(tmp_path / "fresh")


def test_a_layer_is_not_taken_over_where_the_one_before_is_coded_otherwise(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its codes make up for what that one lost."""
    options = little_calibration(tmp_path, monkeypatch)
    plan = make_plan(models, budget="0.4x", threshold=0.0, **options)
    first, most = plan.layers[0], default_code(4)
    other = [[(most, most)] * len(members) for members in first.slots]
    assert first.with_codes(other) != first
    changed = replace(plan, layers=(first.with_codes(other), *plan.layers[1:]))
    stop(models, tmp_path / "pack", 3, plan=plan, **options)
    consolidate(models, tmp_path / "pack", plan=changed, **options)
    consolidate(models, tmp_path / "fresh", plan=changed, **options)
    assert tree_digests(tmp_path / "pack") == tree_digests(tmp_path / "fresh")


def test_a_bad_model_leaves_nothing(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tensor = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    models = [
        make_checkpoint("a", parent=tmp_path / "in"),
        make_checkpoint(
            "b", seed=1, parent=tmp_path / "in", edit=lambda all: all[tensor].fill_(float("nan"))
        ),
    ]
    with pytest.raises(CheckpointError, match="layer 1, expert 3: a weight is not finite"):
        consolidate(models, tmp_path / "pack")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_84_a_second_writer_is_refused_at_once(models: list[Path], tmp_path: Path) -> None:
    def meanwhile(step: Progress) -> None:
        if (step.stage, step.done) == ("experts", 2):
            with pytest.raises(UsageError, match=r"pack: another moec is writing it; wait"):
                consolidate(models, tmp_path / "pack")

    consolidate(models, tmp_path / "pack", on_progress=meanwhile)
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


STAGINGS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a link": (lambda one, other: one.symlink_to(other), "not a folder; remove it"),
    "a file": (lambda one, other: one.touch(), "not a folder; remove it"),
    "a folder of somebody's": (
        lambda one, other: (one / "thesis").mkdir(parents=True),
        "thesis: not made by this user's moec",
    ),
    "a link inside": (
        lambda one, other: (one.mkdir(), (one / "pack").symlink_to(other)),
        "pack: not made by this user's moec",
    ),
}


@pytest.mark.parametrize("case", STAGINGS)
def test_what_moec_did_not_make_is_left_alone(
    case: str, models: list[Path], tmp_path: Path
) -> None:
    make, complaint = STAGINGS[case]
    precious = tmp_path / "other" / "precious"
    precious.parent.mkdir()
    precious.touch()
    make(tmp_path / ".pack.partial", precious.parent)
    with pytest.raises(UsageError, match=complaint):
        consolidate(models, tmp_path / "pack")
    assert precious.exists()


def test_a_lock_nobody_holds_is_no_obstacle(
    models: list[Path], expected: dict[str, str], tmp_path: Path
) -> None:
    """As after a kill: the file is there, and the lock went with the process."""
    (tmp_path / ".pack.partial").mkdir()
    (tmp_path / ".pack.partial" / "lock").touch()
    with (tmp_path / ".pack.partial" / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another moec is writing it"):
            consolidate(models, tmp_path / "pack")
    consolidate(models, tmp_path / "pack")
    assert tree_digests(tmp_path / "pack") == expected


def test_operations_that_fail(models: list[Path], expected: dict[str, str], tmp_path: Path) -> None:
    failed = fail_everywhere(models, tmp_path / "pack", expected, stride=23)
    assert set(failed) >= {"write", "fsync"}


def test_kills(tmp_path: Path) -> None:
    command = [sys.executable, str(TESTS / "crash.py"), "--kills", "3", "--skip-faults"]
    command += ["--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["killed"] == 3

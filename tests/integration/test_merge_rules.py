"""Merge rules from the recipe to the pack: what a slot holds is what the rule says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeconsolidate import consolidate
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.pipeline import make_plan
from moeruntime.errors import UsageError
from moeruntime.pack import Pack

NAMES = ("base", "math", "shell")


@pytest.fixture
def folders(checkpoints: dict[str, Path]) -> dict[str, Path]:
    return {name: checkpoints[name] for name in NAMES}


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, list[Path]]:
    """A little of each variant's text: enough for a window."""
    path = tmp_path / "text.jsonl"
    lines = [{"text": "Count the files of a folder and sort them by size. " * 50}] * 2
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return {name: [path] for name in NAMES}


def members_of(folders: Mapping[str, Path], layer: int, expert: int) -> list[Tensor]:
    rows = []
    for name, folder in folders.items():
        with Checkpoint(name, folder) as checkpoint:
            row_P = torch.empty(checkpoint.config.expert_numel, dtype=checkpoint.expert_dtype)
            checkpoint.read_expert(layer, expert, out=row_P)
            rows.append(row_P)
    return rows


def slot_of(pack: Path, layer: int, slot: int) -> Tensor:
    with Pack(pack) as opened:
        parts = []
        for part in ("gate_up", "down"):
            (stored,) = opened.slot(layer, part, slot)
            parts.append(stored.read().flatten())
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        ("first", lambda rows, slot: rows[0]),
        ("round-robin", lambda rows, slot: rows[slot % 3]),
        ("task-arithmetic", lambda rows, slot: rows[0] + 0.5 * (rows[1] + rows[2] - 2 * rows[0])),
    ],
)
def test_slots_hold_what_the_rule_says(
    merge: str,
    expected: Callable[[list[Tensor], int], Tensor],
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    result = consolidate(folders, tmp_path / "pack", merge=merge)
    assert (result.plan.recipe.merge, result.plan.recipe.code) == (merge, "plain")
    for slot in (0, 4, 7):
        rows = [row_P.float() for row_P in members_of(folders, 2, slot)]
        stored_P = slot_of(tmp_path / "pack", 2, slot)
        torch.testing.assert_close(stored_P.float(), expected(rows, slot), rtol=2**-8, atol=1e-7)


def test_rules_over_whole_experts_use_the_texts(
    folders: dict[str, Path], texts: dict[str, list[Path]], tmp_path: Path
) -> None:
    result = consolidate(folders, tmp_path / "pack", merge="regmean", calibration=texts)
    assert result.plan.recipe.calibration == "text"
    assert set(result.plan.recipe.texts) == set(NAMES)
    for slot in (0, 7):
        mean_P = torch.stack(members_of(folders, 1, slot)).float().mean(dim=0)
        stored_P = slot_of(tmp_path / "pack", 1, slot).float()
        # Near the average, and not it.
        assert 1e-3 < float((stored_P - mean_P).norm() / mean_P.norm()) < 0.3


def test_a_plan_keeps_its_rule(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = make_plan(folders, merge="round-robin")
    consolidate(folders, tmp_path / "planned", plan=plan)
    consolidate(folders, tmp_path / "direct", merge="round-robin")
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("planned", "direct")]
    assert manifests[0] == manifests[1]


def test_rules_and_nested_codes_exclude_each_other(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="makes plain experts, not nested codes"):
        consolidate(folders, tmp_path / "pack", merge="ties", code="nested")
    with pytest.raises(UsageError, match="which only nested codes have"):
        consolidate(folders, tmp_path / "pack", merge="ties", budget="0.3x")

"""The workflow of docs/ci.md: it parses, and its commands do what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import MakeCheckpoint
from hub_fixtures import TOKEN, hub
from hub_server import Hub
from moeconsolidate import cli

__all__ = ["hub"]

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "ci.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return str(found)


def workflow() -> dict[str, Any]:
    document = yaml.safe_load(block("yaml"))
    assert isinstance(document, dict)
    return document


def test_it_is_a_workflow() -> None:
    document = workflow()
    # YAML 1.1 takes the key "on" for a boolean, and so does every parser of workflows.
    assert set(document) == {"name", True, "jobs"}
    for step in document["jobs"]["pack"]["steps"]:
        assert len({"uses", "run"} & set(step)) == 1
        assert set(step) <= {"name", "uses", "with", "run", "env"}
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])


def test_its_commands_run(
    hub: Hub, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("base", "math")):
        hub.add(f"org/{name}", make_checkpoint(name, seed=seed))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    recipe = "models = ['org/base', 'org/math']\ncode = 'plain'\n"
    (tmp_path / "recipe.toml").write_text(recipe)
    steps = workflow()["jobs"]["pack"]["steps"]
    lines = [line for step in steps for line in step.get("run", "").splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("moec ")]
    assert [command[0] for command in commands] == [
        *("plan", "consolidate", "verify", "inspect", "push"),
    ]
    for command in commands:
        with pytest.raises(SystemExit) as end:
            cli.main(command)
        assert end.value.code == 0, command
    assert "manifest.json" in hub.repos["org/pack"].files


def test_the_recipe_of_the_page_is_one(tmp_path: Path) -> None:
    from moeconsolidate.recipe_file import read_request

    (tmp_path / "recipe.toml").write_text(block("toml"))
    request = read_request(tmp_path / "recipe.toml", None, calibration={})
    assert request.choices == {"budget": "0.3x"}
    assert set(request.calibration) == {"base", "math", "shell"}

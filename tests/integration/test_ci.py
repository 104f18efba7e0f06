"""What a program that calls moec relies on: recipes, events, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import tree_digests
from moeconsolidate import cli

COUNTS = ("done", "event", "stage", "total", "unit")


def moec(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main([str(one) for one in arguments])
    captured = capfd.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, captured.out, captured.err


def events(err: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in err.splitlines()]


def test_a_recipe_is_what_its_options_are(
    checkpoints: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    models = [f"{name}={checkpoints[name]}" for name in ("base", "math")]
    recipe.write_text(f"models = {json.dumps(models)}\nthreshold = 0.95\nmerge = 'average'\n")
    given = ["consolidate", *models, "--threshold", "0.95", "--merge", "average", "--quiet"]
    assert moec(capfd, *given, "--out", tmp_path / "given")[0] == 0
    call = ["consolidate", "--recipe", recipe, "--quiet"]
    assert moec(capfd, *call, "--out", tmp_path / "read")[0] == 0
    assert tree_digests(tmp_path / "given") == tree_digests(tmp_path / "read")
    assert moec(capfd, *call, "--threshold", "0.5", "--out", tmp_path / "other")[0] == 0
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    assert (manifest["recipe"]["threshold"], manifest["recipe"]["merge"]) == (0.5, "average")


def test_events_are_one_json_object_a_line(
    checkpoints: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    models = [checkpoints["base"], checkpoints["math"]]
    call = ["consolidate", *models, "--code", "plain", "--json", "--out", tmp_path / "pack"]
    code, out, err = moec(capfd, *call)
    assert code == 0
    assert json.loads(out)["pack"] == str(tmp_path / "pack")
    seen = events(err)
    assert {tuple(sorted(one)) for one in seen} == {COUNTS}
    assert [one["done"] for one in seen if one["stage"] == "experts"] == [1, 2, 3, 4]
    code, out, err = moec(capfd, *call)
    assert (code, out) == (2, "")
    (event,) = events(err)
    assert (event["event"], event["exit_code"]) == ("error", 2)
    assert "exists already" in str(event["message"])


def test_a_call_that_cannot_be_parsed_is_an_event_too(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = moec(capfd, "consolidate", "--json", "--treshold", "1")
    assert code == 2
    assert events(err)[0]["exit_code"] == 2

"""What a program that calls moec relies on: recipes, events, exit codes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from helpers import MakeCheckpoint, tree_digests
from hub_fixtures import hub
from hub_server import Hub
from moeconsolidate import cli, consolidate
from moeconsolidate.dry_run import dry_run
from moeconsolidate.evaluation import EvaluationRow, Score
from moeconsolidate.options import once, pairs_of
from moeconsolidate.report import summarise
from moeruntime import Pack
from moeruntime.errors import CheckpointError, InputError, UsageError

__all__ = ["hub"]

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


# -- a dry run -------------------------------------------------------------------------------------


def tensor_bytes(pack: Path) -> int:
    with Pack(pack) as opened:
        return summarise(opened).pack_bytes


@pytest.mark.parametrize("options", [{}, {"threshold": 1.0}, {"code": "plain"}, {"threshold": 0.0}])
def test_a_pack_is_as_large_as_predicted(
    options: dict[str, object], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    models = [checkpoints["base"], checkpoints["math"]]
    estimate = dry_run(models, options, {})
    least, most = estimate.pack_bytes
    assert least <= tensor_bytes(consolidate(models, tmp_path / "pack", **options).pack) <= most
    assert estimate.download_bytes == {}
    assert estimate.memory_bytes is not None and estimate.arithmetic_s is not None
    assert estimate.memory_bytes > 100_000_000
    assert 0.001 < estimate.arithmetic_s < 100


def test_budgets_bound_the_pack_and_calibration_is_not_predicted(
    checkpoints: dict[str, Path],
) -> None:
    estimate = dry_run([checkpoints["base"], checkpoints["math"]], {"budget": "0.3x"}, {})
    whole = dry_run([checkpoints["base"], checkpoints["math"]], {"threshold": 1.0}, {})
    assert estimate.pack_bytes[1] < whole.pack_bytes[1]
    assert (estimate.memory_bytes, estimate.arithmetic_s) == (None, None)


def test_nothing_is_downloaded_for_it(
    hub: Hub,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    repos = [hub.add(f"org/{name}", checkpoints[name]) for name in ("base", "math")]
    weights = "model.safetensors"
    models = ["org/base", "x=org/math"]
    code, out, _ = moec(capfd, "plan", *models, "--dry-run", "--json")
    assert code == 0
    sizes = [len(repo.files[weights]) for repo in repos]
    assert json.loads(out)["download_bytes"] == dict(zip(("base", "x"), sizes, strict=True))
    assert hub.bytes_sent(weights) <= 2 * 65536
    consolidate(models, tmp_path / "pack")
    assert set(dry_run(models, {}, {}).download_bytes.values()) == {0}
    code, _, err = moec(capfd, "plan", *models, "--dry-run", "--out", tmp_path / "plan.json")
    assert code == 2
    assert "--dry-run decides nothing" in err


def test_a_dry_run_refuses_what_fits_no_pack(
    make_checkpoint: MakeCheckpoint, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    other = make_checkpoint("other")
    with pytest.raises(CheckpointError):
        dry_run({"base": checkpoints["base"], "other": other}, {}, {})
    same = {"a": other, "b": make_checkpoint("same")}
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file"):
        dry_run(same, {"budget": "0.3x"}, {name: [tmp_path / "nowhere.jsonl"] for name in same})


def test_what_no_number_fits(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    models = [f"{name}={checkpoints[name]}" for name in ("base", "math")]
    for budget in ("9" * 400 + "x", "99999999999GB"):
        code, _, err = moec(capfd, "plan", *models, "--budget", budget)
        assert code == 2 and "4611686018427387904" in err
    code, _, err = moec(capfd, "plan", *models, "--out", tmp_path / "no" / "plan.json")
    assert code == 2 and "no such folder" in err
    assert Score(1, 800.0).perplexity == math.inf
    row = EvaluationRow("a", "a.jsonl", Score(1, 800.0), Score(1, math.nan))
    assert row.to_json()["perplexity"] is row.to_json()["nll_increase"] is None


def test_a_reference_is_given_once() -> None:
    pairs = pairs_of("--reference", ["a=x", "b=y", "a=z"])
    with pytest.raises(UsageError, match="twice for 'a'"):
        once("--reference", pairs)
    assert once("--reference", pairs[:2]) == {"a": Path("x"), "b": Path("y")}


def test_a_context_of_one_token_cannot_be_calibrated(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    models = [make_checkpoint(name, config={"max_position_embeddings": 1}) for name in ("a", "b")]
    with pytest.raises(CheckpointError, match="a context of 1 token"):
        consolidate(models, tmp_path / "pack", budget="0.3x")
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("seconds", ["inf", "nan", "1e9"])
@pytest.mark.parametrize("option", ["--header-timeout", "--drain-timeout"])
def test_a_time_is_a_number_of_seconds(
    capfd: pytest.CaptureFixture[str], option: str, seconds: str
) -> None:
    code, _, err = moec(capfd, "serve", "--artifact", "pack", option, seconds)
    assert code == 2 and option in err

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeconsolidate.recipe_file import Request, read_request
from moeruntime.errors import InputError, UsageError

WHOLE = """
models = ["base=org/base@v1", "beside", "x=beside", "/absolute/model"]
threshold = 0.8
similarity = "cka"
signal = "weights"
align = true
merge = "ties"
code = "plain"
shared-bits = 3
budget = "0.3x"
max-loss = 0.5

[calibration]
base = ["texts/a.jsonl", "b.jsonl"]
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path: Path, models: list[str] | None = None, **given: Any) -> Request:
    return read_request(path, models, calibration=given.pop("calibration", {}), **given)


def test_every_option_can_be_in_it(tmp_path: Path) -> None:
    (tmp_path / "beside").mkdir()
    request = read(write(tmp_path, WHOLE))
    beside = tmp_path / "beside"
    assert request.models == ["base=org/base@v1", str(beside), f"x={beside}", "/absolute/model"]
    assert request.choices == {
        "threshold": 0.8,
        "similarity": "cka",
        "signal": "weights",
        "align": True,
        "merge": "ties",
        "code": "plain",
        "shared_bits": 3,
        "budget": "0.3x",
        "max_loss": 0.5,
    }
    assert request.calibration == {"base": [tmp_path / "texts/a.jsonl", tmp_path / "b.jsonl"]}


def test_the_command_line_goes_first(tmp_path: Path) -> None:
    own = {"base": [Path("mine.jsonl")]}
    request = read(write(tmp_path, WHOLE), ["a", "b"], threshold=0.5, merge=None, calibration=own)
    assert request.models == ["a", "b"]
    assert (request.choices["threshold"], request.choices["merge"]) == (0.5, "ties")
    assert request.calibration == own


def test_without_a_file(tmp_path: Path) -> None:
    request = read_request(None, ["a", "b"], calibration={}, threshold=0.5, merge=None)
    assert request == Request(["a", "b"], {"threshold": 0.5}, {})
    for nowhere in (None, write(tmp_path, "threshold = 0.5")):
        with pytest.raises(UsageError, match=r"Missing argument '\[NAME=\]MODEL'"):
            read_request(nowhere, None, calibration={})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("speed = 1", "unknown field 'speed'"),
        ("shared_bits = 4", "unknown field 'shared_bits'"),
        ("threshold = 2.0", "field 'threshold' is 2.0, outside 0..1"),
        ("threshold = nan", "field 'threshold' is nan"),
        ("threshold = '0.9'", "field 'threshold' must be a number, not a string"),
        ("threshold = true", "field 'threshold' must be a number, not a boolean"),
        ("threshold = 2026-01-01", "field 'threshold' must be a number"),
        ("align = 1", "field 'align' must be true or false"),
        ("models = 'a'", "field 'models' must be a list"),
        ("models = [1]", "field 'models' must be a list of strings"),
        ("calibration = 1", "calibration: must be a JSON object|calibration"),
        ("[calibration]\na = []", "calibration: field 'a' must be a list of files"),
        ("[calibration]\na = 'x'", "field 'a' must be a list"),
        ("a = 1\na = 2", "not valid TOML"),
        ("a = ", "not valid TOML"),
        (b"\xff", "not UTF-8 at byte 0"),
        ("a = " + "[" * 10_000, "nested too deeply|not valid TOML"),
        ("#" * 2**21, "more than the 1048576 of a recipe"),
    ],
)
def test_93_what_makes_no_sense(text: str | bytes, complaint: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=complaint) as problem:
        read(path)
    assert str(problem.value).startswith(str(path))


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "none.toml")
    with pytest.raises(InputError, match="not a regular file"):
        read(tmp_path)


def test_a_budget_takes_the_place_of_a_loss(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('models = ["a", "b"]\nbudget = "0.3x"\nthreshold = 0.8\n')
    request = read_request(path, None, calibration={}, max_loss=0.1)
    assert request.choices == {"threshold": 0.8, "max_loss": 0.1}


def test_a_folder_with_an_equals_sign_stays_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    path = Path("recipe.toml")
    path.write_text('models = ["./a=b"]\n')
    assert read_request(path, None, calibration={}).models == ["./a=b"]

from __future__ import annotations

from pathlib import Path

import pytest

from moeconsolidate.sources import HubRef, Source, parse_hub_ref, parse_sources
from moeruntime.errors import CheckpointError, UsageError


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a=b", "odd name", "common", "sub/a"):
        (tmp_path / name).mkdir(parents=True)


def names(*models: str | Path) -> list[str]:
    return [source.name for source in parse_sources(models)]


def test_names_are_given_or_taken_from_the_folder(tmp_path: Path) -> None:
    assert parse_sources(["a", "math=b"]) == (Source("a", Path("a")), Source("math", Path("b")))
    assert names("a/", tmp_path / "b") == ["a", "b"]
    assert names("a", "x=./a=b") == ["a", "x"]
    assert parse_sources({"x": "a=b", "y": tmp_path / "a"})[0] == Source("x", Path("a=b"))


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "a")
    assert names(".", "../b") == ["a", "b"]


def test_a_link_keeps_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(tmp_path / "a")
    assert names("latest", "b") == ["latest", "b"]


@pytest.mark.parametrize(
    ("models", "complaint"),
    [
        ([], "at least two models, got 0"),
        (["a"], "at least two models, got 1"),
        ("a", "must be a list"),
        (["a", "sub/a"], "would both be called 'a'"),
        (["A=a", "a=b"], "case is ignored"),
        (["a", "x=./a"], "are the same folder"),
        (["a", "b="], "names no model"),
        (["a", "=b"], "is not a variant name"),
        (["a", "-x=b"], "is not a variant name"),
        (["a", "common=b"], "is not a variant name"),
        (["a", "x.safetensors=b"], "is not a variant name"),
        (["a", "x" * 65 + "=b"], "is not a variant name"),
        (["a", "odd name"], "give one with NAME=odd name"),
        (["a", "common"], "give one with NAME=common"),
    ],
)
def test_calls_that_make_no_sense(models: list[str] | str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        parse_sources(models)


@pytest.mark.parametrize(
    "model",
    [
        *("none", "x=none", "x" * 5000, "a\0b", "./org/model", "../x/y", "/org/model", "a/b/c"),
        *("org/", "org/model@", "org/mo--del", "org/model.git", "org/..", "https://org/model"),
        *("org/model@../x", "org/model@a..b", "org/model\n", "a/b\0", "org/model@-x"),
    ],
)
def test_folders_that_are_not_there(model: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder; MODEL must be a checkpoint folder"):
        parse_sources(["a", model])


def test_models_of_the_hub() -> None:
    assert parse_sources(["a", "org/model"])[1] == Source("model", HubRef("org/model"))
    assert parse_sources(["a", "x=org/model@v1.0"])[1] == Source("x", HubRef("org/model", "v1.0"))
    assert parse_hub_ref("org/model@refs/pr/1") == HubRef("org/model", "refs/pr/1")
    assert names("org/m", "n=org/m@other") == ["m", "n"]
    assert parse_sources(["b", "sub/a"])[1].origin == Path("sub/a")  # a folder that is there wins
    with pytest.raises(UsageError, match="'m' and 'n' are the same model org/m"):
        parse_sources(["org/m", "n=org/m@main"])


def test_a_link_to_a_folder_already_given(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(UsageError, match="are the same folder"):
        parse_sources(["a", "link"])

"""Hubs that do not have it, will not give it, cannot be reached, or do not tell the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hostile.attacks import entries
from hostile.conftest import Refused
from hub_fixtures import TOKEN, cache, hub
from hub_server import Hub

__all__ = ["cache", "hub"]

pytestmark = pytest.mark.timeout(60)
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def refuse_tokens(hub: Hub) -> None:
    hub.refuse_tokens = True


REFUSALS: dict[str, tuple[str, str | None, Callable[[Hub], object], list[str]]] = {
    "89-no-such-model": (
        "org/none",
        None,
        lambda hub: None,
        ["org/none: no such folder, and no such model on the hub, or a private one: then", LOG_IN],
    ),
    "89-no-such-model-for-this-token": (
        "org/none",
        TOKEN,
        lambda hub: None,
        ["org/none: no such folder, and no such model on the hub, or one your token does not"],
    ),
    "89-no-such-revision": (
        "org/b@v9",
        None,
        lambda hub: None,
        ["org/b@v9: the model is there, but no revision 'v9'"],
    ),
    "89-private": (
        "org/b",
        None,
        lambda hub: setattr(hub.repos["org/b"], "token", "hf_another"),
        ["org/b: no such folder, and no such model on the hub, or a private one: then", LOG_IN],
    ),
    "89-gated": (
        "org/b",
        TOKEN,
        lambda hub: setattr(hub.repos["org/b"], "gated", True),
        ["org/b: gated: accept its terms at http://127.0.0.1", "/org/b, and", LOG_IN],
    ),
    "89-expired-token": (
        "org/b",
        TOKEN,
        refuse_tokens,
        ["org/b: http://127.0.0.1", "does not accept the token: expired or mistyped", LOG_IN],
    ),
    "89-forbidden": (
        "org/b",
        TOKEN,
        lambda hub: setattr(hub, "status", 403),
        ["org/b: the token may not read this model"],
    ),
    "89-a-broken-hub": (
        "org/b",
        None,
        lambda hub: setattr(hub, "status", 500),
        ["org/b: http://127.0.0.1", "answered 500; try again later"],
    ),
}


@pytest.fixture
def models_on_hub(hub: Hub, models: Path) -> Path:
    hub.add("org/b", models / "b")
    hub.add("org/shards", models / "shards")
    return models


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(
    case: str,
    hub: Hub,
    models_on_hub: Path,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, token, change, words = REFUSALS[case]
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    change(hub)
    arguments = [models_on_hub / "a", model, "--out", tmp_path / "out", "--quiet"]
    line = refused(4, words, "consolidate", *arguments)
    assert "SECRET" not in line


def test_90_nobody_answers(
    hub: Hub,
    models_on_hub: Path,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    words = [f"org/b: no such folder, and {address} cannot be reached (ConnectError)"]
    arguments = [models_on_hub / "a", "org/b", "--out", tmp_path / "out", "--quiet"]
    refused(4, words, "consolidate", *arguments)


@pytest.mark.parametrize("revision", ["main", "0" * 40])
def test_90_offline_and_not_cached(
    revision: str,
    hub: Hub,
    models_on_hub: Path,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = ["org/b@", " not in the cache, and HF_HUB_OFFLINE is set; unset it to download"]
    if revision == "main":
        words[0] = "org/b: "
    arguments = [models_on_hub / "a", f"org/b@{revision}", "--out", tmp_path / "out", "--quiet"]
    refused(4, words, "consolidate", *arguments)
    assert hub.sent == []


def test_90_offline_and_cached_in_part(
    hub: Hub,
    cache: Path,
    models_on_hub: Path,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit = hub.repos["org/shards"].commit
    shard = "model-00002-of-00003.safetensors"
    hub.cut_after[shard] = [2**30, 10, *[0] * 6]
    arguments = [models_on_hub / "a", f"org/shards@{commit}", "--out", tmp_path / "out", "--quiet"]
    words = [f"{shard}: ", " after 10 of ", "they are kept, and the same command goes on"]
    refused(4, words, "consolidate", *arguments)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(4, [f"{shard} is not in the cache"], "consolidate", *arguments)


LIES: dict[str, tuple[Callable[[list[dict[str, object]]], object], int, list[str]]] = {
    "39-a-way-out": (
        lambda tree: tree.append(tree[0] | {"path": "../../../evil"}),
        0,
        [],
    ),
    "89-a-digest-that-is-a-path": (
        lambda tree: tree[0].update(oid="../../../evil"),
        4,
        ["the hub lists config.json with an impossible size or digest"],
    ),
    "89-a-size-below-zero": (
        lambda tree: tree[0].update(size=-1),
        4,
        ["the hub lists config.json with an impossible size or digest"],
    ),
    "89-a-size-beyond-any-disk": (
        lambda tree: tree[1].update(lfs={"oid": "0" * 64, "size": 2**60, "pointerSize": 1}),
        4,
        ["the hub lists model.safetensors with an impossible size or digest"],
    ),
    "89-an-lfs-digest-that-is-none": (
        lambda tree: tree[1].update(lfs={"oid": "0" * 63, "size": 20, "pointerSize": 1}),
        4,
        ["the hub lists model.safetensors with an impossible size or digest"],
    ),
    "89-no-size": (
        lambda tree: tree[0].pop("size"),
        4,
        ["org/b: ", "gives no answer that makes sense"],
    ),
    "89-no-list": (lambda tree: tree.clear(), 3, ["org/b@", "no config.json"]),
}


@pytest.mark.parametrize("case", LIES)
def test_lies(
    case: str,
    hub: Hub,
    cache: Path,
    models_on_hub: Path,
    refused: Refused,
    moec: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    change, code, words = LIES[case]
    hub.edit_tree = change
    arguments = [models_on_hub / "a", "org/b", "--out", tmp_path / "out", "--quiet"]
    if code:
        refused(code, words, "consolidate", *arguments)
    else:
        assert moec("consolidate", *arguments)[0] == 0
    assert not [one for one in entries(cache.parent.parent) if "evil" in one]


def test_59_models_that_name_different_bases(
    models: Path, moec: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Allowed, and told: one line that begins with "moec: warning: "."""
    for name, base in (("a", "org/base-v1"), ("b", "org/base-v2")):
        config = json.loads((models / name / "config.json").read_text())
        (models / name / "config.json").write_text(json.dumps(config | {"_name_or_path": base}))
    arguments = [models / "a", models / "b", "--out", tmp_path / "out", "--quiet"]
    code, _, err = moec("consolidate", *arguments)
    assert code == 0
    assert err.startswith("moec: warning: a says it is made from org/base-v1 and b from org/b")
    assert err.count("\n") == 1

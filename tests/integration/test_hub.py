"""Models by name: judged before they are downloaded, downloaded once, checked, found again."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _subjects import folders_of
from safetensors.torch import load_file

from helpers import MakeCheckpoint, tree_digests
from hub_fixtures import TOKEN, cache, hub
from hub_server import Hub
from moeconsolidate import cli, consolidate
from moeconsolidate.export import export_variant
from moeconsolidate.hub import transfer
from moeconsolidate.hub.upload import _origins
from moeruntime import verify_pack
from moeruntime.errors import CheckpointError, HubError, IntegrityError, ResourceError
from moeruntime.pack import Manifest
from switch_fixtures import make_switch

__all__ = ["cache", "hub"]

pytestmark = pytest.mark.timeout(60)
WEIGHTS = "model.safetensors"


@pytest.fixture
def two(hub: Hub, make_checkpoint: MakeCheckpoint) -> list[str]:
    """Two models on the hub, the second in shards."""
    hub.add("org/base", make_checkpoint("base", seed=0))
    hub.add("org/tuned", make_checkpoint("tuned", seed=1, num_shards=2))
    return ["org/base", "org/tuned"]


def blobs(cache: Path) -> list[Path]:
    return sorted(cache.glob("models--*/blobs/*"))


def test_models_by_name_give_the_pack_of_their_folders(
    hub: Hub, two: list[str], tmp_path: Path
) -> None:
    result = consolidate(two, tmp_path / "pack")
    assert result.manifest.variant_names == ("base", "tuned")
    assert result.manifest.provenance["origins"] == {
        name: {"hub": f"org/{name}", "commit": hub.repos[f"org/{name}"].commit}
        for name in ("base", "tuned")
    }
    card = (tmp_path / "pack" / "README.md").read_text()
    assert card.startswith(
        "---\nbase_model:\n- org/base\n- org/tuned\nbase_model_relation: merge\n"
    )
    consolidate([tmp_path / "base", tmp_path / "tuned"], tmp_path / "local")
    of_hub, of_folders = tree_digests(tmp_path / "pack"), tree_digests(tmp_path / "local")
    differ = {name for name in of_hub if of_hub[name] != of_folders[name]}
    assert differ == {"manifest.json", "README.md"}
    verify_pack(tmp_path / "pack")


def test_encoder_decoders_come_from_the_hub_too(
    hub: Hub, checkpoints: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """As benchmarks/switch.py takes google/switch-base-8 and its fine-tunes."""
    tokenizer = checkpoints["base"]
    for seed, name in enumerate(("google/switch-base-8", "org/switch-tuned")):
        hub.add(name, make_switch(tmp_path / name.partition("/")[2], tokenizer, seed=seed))
    folders = folders_of(["base=google/switch-base-8", "tuned=org/switch-tuned"])
    assert list(folders) == ["base", "tuned"]
    assert all(folder.is_relative_to(cache) for folder in folders.values())
    result = consolidate(
        ["base=google/switch-base-8", "tuned=org/switch-tuned"], tmp_path / "pack", threshold=1.0
    )
    assert result.manifest.family == "switch_transformers"
    out = export_variant(tmp_path / "pack", "tuned", tmp_path / "again")
    again, original = (load_file(folder / WEIGHTS) for folder in (out, folders["tuned"]))
    assert all(torch.equal(tensor, original[name]) for name, tensor in again.items())


def test_nothing_is_downloaded_twice(
    hub: Hub, two: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    consolidate(two, tmp_path / "first")
    read: list[Path] = []
    monkeypatch.setattr(transfer, "_hash_file", lambda path, *_: read.append(path))
    hub.sent.clear()
    consolidate(two, tmp_path / "again")
    assert [one for one in hub.sent if one[0] == "cdn"] == []
    assert read == []  # they were checked when they came
    assert tree_digests(tmp_path / "first") == tree_digests(tmp_path / "again")


def test_offline_finds_what_was_downloaded(
    hub: Hub, two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    consolidate(two, tmp_path / "first")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.sent.clear()
    consolidate(two, tmp_path / "again")
    by_commit = [f"{one}@{hub.repos[one].commit}" for one in two]
    consolidate(by_commit, tmp_path / "pinned")
    assert hub.sent == []
    assert tree_digests(tmp_path / "first") == tree_digests(tmp_path / "again")
    assert tree_digests(tmp_path / "first") == tree_digests(tmp_path / "pinned")


def test_a_cut_connection_goes_on_where_it_was(
    hub: Hub, two: list[str], cache: Path, tmp_path: Path
) -> None:
    size = len(hub.repos["org/base"].files[WEIGHTS])
    # The first answer is of the header.
    hub.cut_after[WEIGHTS] = [2**30, 100_000, 0, 1, 50_000]
    consolidate(two, tmp_path / "pack")
    asked = [one[3] for one in hub.sent if one[0] == "cdn" and one[2] == WEIGHTS][1:]
    starts = [0, 100_000, 100_000, 100_001, 150_001]
    assert asked == [f"bytes={start}-{size - 1}" for start in starts]
    assert hub.bytes_sent(WEIGHTS) < size + 100_000
    assert not list(cache.rglob("*.moec-partial"))


def test_another_process_goes_on_where_one_gave_up(
    hub: Hub, two: list[str], cache: Path, tmp_path: Path
) -> None:
    size = len(hub.repos["org/base"].files[WEIGHTS])
    hub.cut_after[WEIGHTS] = [2**30, 100_000, *[0] * 6]
    with pytest.raises(HubError, match=r"after 100000 of .* they are kept, and the same command"):
        consolidate(two, tmp_path / "pack")
    (partial,) = cache.rglob("*.moec-partial")
    assert partial.stat().st_size == 100_000
    hub.sent.clear()
    consolidate(two, tmp_path / "pack")
    asked = [one[3] for one in hub.sent if one[0] == "cdn" and one[2] == WEIGHTS]
    assert asked[-1] == f"bytes=100000-{size - 1}"
    verify_pack(tmp_path / "pack")


def test_a_server_without_ranges_sends_all_of_it_again(
    hub: Hub, two: list[str], tmp_path: Path
) -> None:
    hub.no_ranges = True
    hub.cut_after[WEIGHTS] = [2**30, 100_000, 150_000]
    consolidate(two, tmp_path / "pack")
    verify_pack(tmp_path / "pack")


@pytest.mark.parametrize("damage", ["other bytes", "longer", "a spoilt beginning"])
def test_what_arrives_is_held_against_the_listed_digest(
    damage: str, hub: Hub, two: list[str], cache: Path, tmp_path: Path
) -> None:
    repo = hub.repos["org/base"]
    whole = repo.files[WEIGHTS]
    if damage == "a spoilt beginning":  # on this machine, between two runs
        hub.cut_after[WEIGHTS] = [2**30, 100_000, *[0] * 6]
        with pytest.raises(HubError):
            consolidate(two, tmp_path / "pack")
        (partial,) = cache.rglob("*.moec-partial")
        partial.write_bytes(bytes(100_000))
    else:
        repo.listed[WEIGHTS] = whole
        repo.files[WEIGHTS] = whole[:-1] + b"?" if damage == "other bytes" else whole + b"?"
        hub.no_ranges = damage == "longer"  # or the end is never asked for
    with pytest.raises(IntegrityError, match=r"org/base@\w{12}.*model.safetensors"):
        consolidate(two, tmp_path / "pack")
    assert not [blob for blob in blobs(cache) if blob.stat().st_size >= len(whole)]
    repo.files[WEIGHTS] = whole
    consolidate(two, tmp_path / "pack")
    verify_pack(tmp_path / "pack")


def test_a_damaged_cache_is_found(
    hub: Hub, two: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    consolidate(two, tmp_path / "pack")
    blob = max(blobs(cache), key=lambda one: one.stat().st_size)
    contents = bytearray(blob.read_bytes())
    contents[-1] ^= 1
    blob.write_bytes(contents)
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(IntegrityError, match=f"{blob.name}: not what the hub listed"):
            consolidate(two, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"num_local_experts": 3}, r"org/odd@\w{12}/model.safetensors: .* config.json asks for"),
        ({"model_type": "llama"}, r"org/odd@\w{12}/config.json: model_type 'llama' is not known"),
        ({"rms_norm_eps": 0.5}, r"org/odd@\w{12} cannot share a pack: config.json: rms_norm_eps"),
    ],
)
def test_what_does_not_fit_is_told_before_weights_move(
    config: dict[str, object],
    complaint: str,
    hub: Hub,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    hub.add("org/base", make_checkpoint("base", config={"vocab_size": 4096}))
    hub.add("org/odd", make_checkpoint("odd", seed=1))
    odd = hub.repos["org/odd"]
    odd.files["config.json"] = json.dumps(json.loads(odd.files["config.json"]) | config).encode()
    with pytest.raises(CheckpointError, match=complaint):
        consolidate(["org/base", "org/odd"], tmp_path / "pack")
    assert hub.bytes_sent(WEIGHTS) <= 2 * 65536
    assert list(tmp_path.glob("moec-preview-*")) == []


def test_long_headers_and_pickles_are_seen_from_afar(
    hub: Hub, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    hub.add("org/base", make_checkpoint("base"))
    header = json.dumps({"a" * 500: {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}})
    padded = header + " " * 200_000
    hub.add("org/long", make_checkpoint("long", seed=1))
    hub.repos["org/long"].files[WEIGHTS] = struct.pack("<Q", len(padded)) + padded.encode() + b"ab"
    with pytest.raises(CheckpointError, match=r"org/long@\w{12}: no tensor model.embed"):
        consolidate(["org/base", "org/long"], tmp_path / "pack")
    hub.repos["org/long"].files[WEIGHTS] = b"version https://git-lfs.github.com/spec/v1\n" * 9
    with pytest.raises(CheckpointError, match="a Git LFS pointer"):
        consolidate(["org/base", "org/long"], tmp_path / "pack")
    hub.repos["org/long"].files["pytorch_model.bin"] = hub.repos["org/long"].files.pop(WEIGHTS)
    with pytest.raises(CheckpointError, match="weights only as a pickle"):
        consolidate(["org/base", "org/long"], tmp_path / "pack")


def test_a_disk_too_small_for_the_downloads(
    hub: Hub, two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1_100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ResourceError, match="free on this disk"):
        consolidate(two, tmp_path / "pack")


def test_the_token_goes_to_the_hub_alone(
    hub: Hub, two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for repo in hub.repos.values():
        repo.token = TOKEN
    consolidate(two, tmp_path / "pack")
    assert any(one[0] == "cdn" for one in hub.sent)
    assert hub.tokens_at_cdn == []
    for path in (tmp_path / "pack").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()


def test_the_settings_of_the_environment_reach_it(hub: Hub, two: list[str], tmp_path: Path) -> None:
    hub.repos["org/base"].token = TOKEN
    env = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
    }
    call = [sys.executable, "-c", "from moeconsolidate.cli import main; main()", "consolidate"]
    call += ["base=org/base@main", "org/tuned", "--out", str(tmp_path / "pack")]
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"org/base/{WEIGHTS}: " in done.stderr
    assert TOKEN not in done.stderr + done.stdout
    assert list((tmp_path / "home" / "hub").glob("models--org--base/snapshots/*/config.json"))


# -- push ------------------------------------------------------------------------------------------


@pytest.fixture
def small_pack(two: list[str], tmp_path: Path) -> Path:
    return consolidate(two, tmp_path / "pack").pack


def test_a_pushed_pack_is_whole_and_says_what_it_is(
    hub: Hub, small_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    before = tree_digests(small_pack)
    scores = tmp_path / "scores.json"
    row = {"model": "base", "data": "x/a|b.jsonl", "tokens": 9, "nll": 2.5, "reference_nll": 2.25}
    scores.write_text(json.dumps({"scores": [row]}))
    call = ["push", str(small_pack), "org/pack", "--scores", str(scores), "--quiet"]
    with pytest.raises(SystemExit) as end:
        cli.main([*call, "--base-model", "org/root"])
    assert end.value.code == 0
    assert tree_digests(small_pack) == before
    files = hub.repos["org/pack"].files
    assert sorted(files) == sorted(before)
    again = tmp_path / "again"
    for name, contents in files.items():
        (again / name).parent.mkdir(parents=True, exist_ok=True)
        (again / name).write_bytes(contents)
    verify_pack(again)
    differ = {name for name, digest in tree_digests(again).items() if digest != before[name]}
    assert differ == {"README.md", "manifest.json"}
    card = files["README.md"].decode()
    assert card.startswith("---\nbase_model:\n- org/base\n- org/tuned\n- org/root\n")
    assert card.count("base_model:") == 1
    assert "| base | a_b.jsonl | 9 | 2.5000 | +0.2500 |" in card
    assert card.index("## Quality") < card.index("## Use")


def test_push_needs_a_token_and_a_sound_pack(
    hub: Hub, small_pack: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def push(target: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["push", str(small_pack), target, "--quiet"])
        return end.value.code, capfd.readouterr().err

    code, err = push("org/pack")
    assert code == 4
    assert "does not let you write there; log in with" in err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuse_tokens = True
    code, err = push("org/pack")
    assert code == 4
    assert "SECRET" not in err
    hub.refuse_tokens = False
    assert push("nonsense")[0] == 2
    (small_pack / "README.md").write_bytes(b"?" * (small_pack / "README.md").stat().st_size)
    code, err = push("org/pack")
    assert (code, "org/pack" in hub.repos) == (5, False)


def test_what_a_pack_says_of_its_origins_is_not_trusted(small_pack: Path) -> None:
    known = Manifest.load(small_pack)
    for origins, names in (
        (5, []),
        ({"a": 7, "b": {"hub": 8}}, []),
        ({"a": {"hub": "org/base"}, "b": {"hub": "org/base\nlicense: mit"}}, ["org/base"]),
    ):
        assert _origins(replace(known, provenance={"origins": origins})) == names

"""81: packs that nobody signed, that somebody else did, or that changed since."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hostile.attacks import edit_json, forge
from hostile.conftest import Moec, Refused

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pairs of keys: ours and theirs."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


def test_81_a_signature_holds(moec: Moec, refused: Refused, bad_pack: Path, keys: Path) -> None:
    assert moec("sign", bad_pack, "--key", keys / "ours.pem")[0] == 0
    assert moec("verify", bad_pack, "--quiet")[0] == 0
    assert moec("verify", bad_pack, "--key", keys / "ours.pub", "--quiet")[0] == 0
    assert moec("inspect", bad_pack)[0] == 0
    words = ["model.sig: not the signature of these files by the owner of", "theirs.pub"]
    refused(5, words, "verify", bad_pack, "--key", keys / "theirs.pub", "--quiet")
    words = ["model.sig: signed already; remove it to sign anew"]
    refused(2, words, "sign", bad_pack, "--key", keys / "ours.pem")


CHANGES: dict[str, Callable[[Path], object]] = {
    "81-a-forged-file": lambda pack: forge(pack, "README.md", b"Trust me.\n"),
    "81-another-recipe": lambda pack: edit_json(
        pack / "manifest.json", lambda one: one["recipe"].update(threshold=0.1)
    ),
    "81-half-a-signature": lambda pack: (pack / "model.sig").write_bytes(
        (pack / "model.sig").read_bytes()[:200]
    ),
    "81-an-empty-signature": lambda pack: (pack / "model.sig").write_bytes(b""),
    "81-a-signature-of-nothing": lambda pack: (pack / "model.sig").write_text(json.dumps({})),
    "81-a-signature-that-is-a-list": lambda pack: (pack / "model.sig").write_text("[[[]]]"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_81_what_changed_since(
    case: str, moec: Moec, refused: Refused, bad_pack: Path, keys: Path
) -> None:
    assert moec("sign", bad_pack, "--key", keys / "ours.pem")[0] == 0
    CHANGES[case](bad_pack)
    words = ["model.sig: not the signature of these files"]
    refused(5, words, "verify", bad_pack, "--key", keys / "ours.pub", "--quiet")


def test_81_no_signature(refused: Refused, bad_pack: Path, keys: Path) -> None:
    words = [f"{bad_pack}: not signed: no model.sig"]
    refused(5, words, "verify", bad_pack, "--key", keys / "ours.pub", "--quiet")
    (bad_pack / "model.sig").symlink_to(keys / "ours.pub")
    refused(5, [], "verify", bad_pack, "--key", keys / "ours.pub", "--quiet")


def test_81_keys_that_are_none(refused: Refused, bad_pack: Path, keys: Path) -> None:
    refused(3, ["none: no such file"], "sign", bad_pack, "--key", keys / "none")
    refused(3, [f"{keys}: not a regular file"], "sign", bad_pack, "--key", keys)
    refused(3, ["no private key of an elliptic"], "sign", bad_pack, "--key", keys / "ours.pub")
    refused(3, ["no private key"], "sign", bad_pack, "--key", bad_pack / "README.md")


def test_81_a_relative_path(
    moec: Moec, bad_pack: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bad_pack.parent)
    assert moec("sign", bad_pack.name, "--key", keys / "ours.pem")[0] == 0
    for place in (bad_pack.name, bad_pack, f"../{bad_pack.parent.name}/{bad_pack.name}"):
        assert moec("verify", place, "--key", keys / "ours.pub", "--quiet")[0] == 0

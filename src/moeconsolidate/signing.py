"""Who made a pack: a signature over all of its files, made and checked by model-signing.

The signature is a Sigstore bundle in the pack's SIGNATURE_NAME, which the `model_signing` command
reads as well. model-signing is an extra: pip install 'moec[sign]'.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moeruntime.errors import InputError, IntegrityError, ResourceError, UsageError
from moeruntime.pack.manifest import SIGNATURE_NAME
from moeruntime.pack.verify import verify_pack

if TYPE_CHECKING:
    from model_signing import hashing

__all__ = ["check_signature", "sign_pack"]


def sign_pack(pack: Path, private_key: Path) -> Path:
    """Sign a pack that `verify_pack` finds whole; returns the signature's file.

    Args:
        pack: its folder; it must not be signed yet.
        private_key: an elliptic curve's, unencrypted PEM.

    Raises:
        IntegrityError: the pack is damaged.
        UsageError: it is signed already.
        InputError: the key is none.
        ResourceError: model-signing is not installed.
    """
    signature = pack / SIGNATURE_NAME
    if os.path.lexists(signature):
        raise UsageError(f"{signature}: signed already; remove it to sign anew")
    _check_key(private_key)
    verify_pack(pack)
    with _installed():
        from model_signing import signing
    partial = pack.parent / f".{pack.name}.{SIGNATURE_NAME}"
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    except Exception as problem:
        raise InputError(
            f"{private_key}: no private key of an elliptic curve in PEM without a password "
            f"({type(problem).__name__})"
        ) from None
    config.set_hashing_config(_all_but_the_signature())
    try:
        config.sign(pack, partial)
        partial.rename(signature)
    finally:
        partial.unlink(missing_ok=True)
    return signature


def check_signature(pack: Path, public_key: Path) -> None:
    """Check that whoever has a key has signed exactly these files.

    Args:
        pack: its folder.
        public_key: an elliptic curve's, PEM.

    Raises:
        IntegrityError: there is no signature, it is another's, or the files are others.
        InputError: the key is none.
        ResourceError: model-signing is not installed.
    """
    signature = pack / SIGNATURE_NAME
    _check_key(public_key)
    if signature.is_symlink() or not signature.is_file():
        raise IntegrityError(f"{pack}: not signed: no {SIGNATURE_NAME}")
    with _installed():
        from model_signing import verifying
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as problem:
        raise InputError(
            f"{public_key}: no public key of an elliptic curve in PEM ({type(problem).__name__})"
        ) from None
    config.set_hashing_config(_all_but_the_signature())
    try:
        config.verify(pack, signature)
    # A signature comes from strangers, and the library has no error of its own for a bad one.
    except Exception as problem:
        raise IntegrityError(
            f"{signature}: not the signature of these files by the owner of {public_key} "
            f"({type(problem).__name__})"
        ) from None


def _all_but_the_signature() -> hashing.Config:
    """What is hashed: all files of the pack but the signature itself."""
    from model_signing import hashing

    # Relative to the pack, wherever that is.
    return hashing.Config().set_ignored_paths(paths=[SIGNATURE_NAME], ignore_git_paths=False)


def _check_key(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as problem:
        if (problem.name or "").partition(".")[0] != "model_signing":
            raise
        raise ResourceError(
            "signatures need model-signing, which is not installed: pip install 'moec[sign]'"
        ) from None

"""A pack onto the hub, in one commit, with a card that says what it was made of and how good it is.

What is uploaded passes `moec verify` after a download: the card that grows on the way gets a new
digest in the manifest that goes with it. The pack on the disk stays as it is.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.utils import disable_progress_bars

from moeconsolidate.hub.client import telling
from moeconsolidate.model_card import card_for_hub
from moeconsolidate.plan import OnProgress, Progress
from moeconsolidate.scores import ScoreRow
from moeconsolidate.sources import HubRef, parse_hub_ref
from moeruntime import __version__
from moeruntime.errors import UsageError
from moeruntime.pack.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest, PackedFile
from moeruntime.pack.verify import verify_pack

__all__ = ["push_pack"]

CARD = "README.md"

_log = logging.getLogger(__name__)


def push_pack(
    pack: Path,
    target: str,
    *,
    private: bool,
    base_models: Sequence[str],
    scores: Sequence[ScoreRow],
    on_progress: OnProgress,
) -> str:
    """Upload a pack.

    Args:
        pack: its folder.
        target: `ORG/NAME[@BRANCH]`; the repository is made if it is not there.
        private: whether a new repository can be seen by its owners only.
        base_models: names on the hub of what it was made of, besides those that it knows.
        scores: what was measured of its variants.
        on_progress: called after each file.

    Returns:
        Where the commit can be looked at.

    Raises:
        UsageError: `target` or a base model is not a name.
        IntegrityError: the pack is damaged: nothing is uploaded.
        HubError: the hub refuses, or cannot be reached.
    """
    ref = _named(target)
    known = Manifest.load(pack)
    if (pack / SIGNATURE_NAME).is_file():
        _log.warning(
            "%s stays here: what is uploaded has another README.md, and so another manifest; sign "
            "what comes from the hub",
            SIGNATURE_NAME,
        )
    bases = _origins(known)
    bases += [_named(one).repo for one in base_models]
    total = len(known.files)
    checked: list[str] = []

    def on_checked(path: str, _: int) -> None:
        checked.append(path)
        on_progress(Progress("check", len(checked), total))

    manifest = verify_pack(pack, on_file=on_checked)
    card = card_for_hub((pack / CARD).read_bytes(), bases, scores)
    entry = PackedFile(len(card), hashlib.sha256(card).hexdigest())
    manifest = replace(manifest, files={**manifest.files, CARD: entry})
    small = {CARD: card, MANIFEST_NAME: manifest.to_bytes()}
    operations = [CommitOperationAdd(name, contents) for name, contents in small.items()]
    operations += [CommitOperationAdd(name, pack / name) for name in checked if name not in small]
    return _commit(ref, operations, private=private, on_progress=on_progress)


def _origins(manifest: Manifest) -> list[str]:
    """Names on the hub of what a pack says it was made of; anything else it may say is left out."""
    origins = manifest.provenance.get("origins")
    named = origins.values() if isinstance(origins, dict) else ()
    names = [one.get("hub") for one in named if isinstance(one, dict)]
    refs = [parse_hub_ref(name) for name in names if isinstance(name, str)]
    return [ref.repo for ref in refs if ref is not None]


def _commit(
    ref: HubRef,
    operations: Sequence[CommitOperationAdd],
    *,
    private: bool,
    on_progress: OnProgress,
) -> str:
    """Upload file by file, which the hub remembers if it is cut, and then name them all at once."""
    api = HfApi(endpoint=constants.ENDPOINT, library_name="moec", library_version=__version__)
    disable_progress_bars()
    with telling(ref, writing=True):
        api.create_repo(ref.repo, private=private, exist_ok=True)
        for number, operation in enumerate(operations, start=1):
            api.preupload_lfs_files(ref.repo, [operation], revision=ref.revision)
            on_progress(Progress("upload", number, len(operations)))
        commit = api.create_commit(
            ref.repo,
            operations,
            commit_message=f"Pack made by moec {__version__}",
            revision=ref.revision,
        )
    return str(commit.commit_url)


def _named(target: str) -> HubRef:
    ref = parse_hub_ref(target)
    if ref is None:
        raise UsageError(f"{ascii(target[:120])} is not ORG/NAME on the hub")
    return ref

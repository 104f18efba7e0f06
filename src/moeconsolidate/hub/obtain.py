"""From sources to checkpoint folders: pin, look, judge, download.

Every model is judged together with the others before the first weight moves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.compatibility import check_compatible
from moeconsolidate.hub.client import PinnedModel, is_offline, pin, place_in_snapshot
from moeconsolidate.hub.preview import SMALL_FILES, listed_weights, make_preview, weight_files
from moeconsolidate.hub.transfer import check_cached, download, missing_bytes
from moeconsolidate.plan import OnProgress, Progress
from moeconsolidate.publish import require_disk
from moeconsolidate.sources import HubRef, Source
from moeruntime.errors import HubError, MoecError

__all__ = ["bytes_to_download", "look", "obtain"]


def obtain(sources: Sequence[Source], report: OnProgress) -> dict[str, PinnedModel]:
    """Bring every model of the hub into the cache, where `snapshot` of each is its folder.

    Returns:
        By variant, the models that came from the hub.

    Raises:
        HubError: the hub does not have a model, refuses it, or cannot be reached.
        CheckpointError, TokenizerError: a model is bad or does not fit the others: told before any
            weight is downloaded.
        IntegrityError: a file is not what the hub listed.
        ResourceError: the disk has no room for the downloads.
    """
    with tempfile.TemporaryDirectory(prefix="moec-preview-") as scratch:
        pinned, _ = look(sources, Path(scratch))
    if num_bytes := sum(map(bytes_to_download, pinned.values())):
        require_disk(next(iter(pinned.values())).snapshot, num_bytes)
    for model in pinned.values():
        _bring(model, report)
    return pinned


def look(
    sources: Sequence[Source], scratch: Path
) -> tuple[dict[str, PinnedModel], dict[str, Path]]:
    """Pin every model of the hub, and judge all models by their headers.

    Args:
        sources: the models.
        scratch: an empty folder, to make previews in.

    Returns:
        By variant: the models of the hub, and a folder to open each model in; those on the hub
        have headers there and no weights.
    """
    pinned: dict[str, PinnedModel] = {}
    folders: dict[str, Path] = {}
    with ExitStack() as stack:
        try:
            checkpoints = []
            for source in sources:
                if isinstance(source.origin, HubRef):
                    model = pinned[source.name] = pin(source.origin)
                    folders[source.name] = scratch / source.name
                    folders[source.name] = _preview(model, folders[source.name])
                else:
                    folders[source.name] = source.origin
                checkpoints.append(
                    stack.enter_context(Checkpoint(source.name, folders[source.name]))
                )
            check_compatible(checkpoints)
        except MoecError as problem:  # which names the preview, and nobody knows that
            message = str(problem)
            for name, model in pinned.items():
                message = message.replace(str(scratch / name), str(model))
            raise type(problem)(message) from None
    return pinned, folders


def bytes_to_download(model: PinnedModel) -> int:
    """What `obtain` would have to ask the hub for, once it has looked."""
    return sum(missing_bytes(model, file) for file in weight_files(model.snapshot, model))


def _preview(model: PinnedModel, folder: Path) -> Path:
    """A folder in which a checkpoint opens: a preview or, offline, what is in the cache."""
    if not is_offline():
        folder.mkdir()
        make_preview(model, folder)
        return folder
    names = listed_weights(model.snapshot) if model.snapshot.is_dir() else ["config.json"]
    for name in names:
        if not (model.snapshot / name).exists():
            raise HubError(
                f"{model}: {name} is not in the cache, and HF_HUB_OFFLINE is set; unset it to "
                "download"
            )
    return model.snapshot


def _bring(model: PinnedModel, report: OnProgress) -> None:
    """Bring one model's files into the cache, one after another, and check what was there."""

    def on_bytes(name: str, total: int, done: int) -> None:
        report(Progress(f"{model.ref.repo}/{name}", done, total, unit="bytes"))

    for file in weight_files(model.snapshot, model):
        download(model, file, partial(on_bytes, file.name, file.num_bytes))
        place_in_snapshot(model, file.name)
    for name in (*SMALL_FILES, *listed_weights(model.snapshot)):
        path = model.snapshot / name
        if path.exists():
            check_cached(path.resolve(), partial(on_bytes, name, path.stat().st_size))
    _remember_revision(model)


def _remember_revision(model: PinnedModel) -> None:
    """Note what commit a branch or tag is, so that it can be found offline."""
    if model.ref.revision != model.commit and not is_offline():
        place = model.storage / "refs" / model.ref.revision
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(model.commit, encoding="ascii")

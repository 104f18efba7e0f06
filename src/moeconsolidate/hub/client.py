"""What the hub is asked, and what its answers and refusals mean.

Nothing that it says is taken on trust: names, sizes and digests are checked before they become
paths or numbers here. No message repeats what a server wrote, which could hold anything, nor the
token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, get_token, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from moeconsolidate.sources import HubRef
from moeruntime import __version__
from moeruntime.errors import HubError

__all__ = [
    "PinnedModel",
    "RemoteFile",
    "answer_bytes",
    "is_offline",
    "pin",
    "place_in_snapshot",
    "stream",
    "telling",
]

MAX_FILES = 10_000
MAX_FILE_BYTES = 2**50
TIMEOUT_S = 30.0
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at the top of a repository.

    Attributes:
        name: plain, so that it can be the name of a file here.
        num_bytes: its size.
        digest: of LFS files the sha256 of the contents; of others git's object id, which is the
            sha1 of the contents behind a line that tells their size. Lower-case hexadecimal. The
            cache calls files by it.
    """

    name: str
    num_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class PinnedModel:
    """A model at one commit.

    Attributes:
        ref: as it was asked for.
        commit: what the revision was when it was asked.
        files: the files at the top of the repository, by name; empty while offline.
    """

    ref: HubRef
    commit: str
    files: Mapping[str, RemoteFile]

    @property
    def storage(self) -> Path:
        """Where the cache keeps this repository."""
        return storage_of(self.ref)

    @property
    def snapshot(self) -> Path:
        """Where the cache shows the files of this commit."""
        return self.storage / "snapshots" / self.commit

    def blob(self, file: RemoteFile) -> Path:
        """Where the cache keeps the contents of a file."""
        return self.storage / "blobs" / file.digest

    def __str__(self) -> str:
        return f"{self.ref.repo}@{self.commit[:12]}"


def is_offline() -> bool:
    """Whether the user wants nothing asked of the network."""
    return constants.is_offline_mode()


def pin(ref: HubRef) -> PinnedModel:
    """Ask what commit a revision is now, and what files it has.

    Offline, the commit is what the cache knows, and no files are listed.

    Raises:
        HubError: the hub does not have it, refuses, or cannot be reached.
    """
    if is_offline():
        return PinnedModel(ref, _cached_commit(ref), {})
    api = HfApi(library_name="moec", library_version=__version__)
    with telling(ref):
        commit = api.model_info(ref.repo, revision=ref.revision, timeout=TIMEOUT_S).sha or ""
        if not _COMMIT.fullmatch(commit):
            raise HubError(f"{ref}: the hub names no commit for revision '{ref.revision}'")
        files = {}
        for number, entry in enumerate(api.list_repo_tree(ref.repo, revision=commit)):
            if number == MAX_FILES:
                raise HubError(f"{ref}: more than {MAX_FILES} files: not a checkpoint")
            if isinstance(entry, RepoFile) and _PLAIN_NAME.fullmatch(entry.path):
                files[entry.path] = _remote_file(ref, entry)
    return PinnedModel(ref, commit, files)


def place_in_snapshot(model: PinnedModel, name: str) -> Path:
    """Have huggingface-hub put a file into the snapshot; it downloads what has no blob yet."""
    with telling(model.ref):
        place = hf_hub_download(
            model.ref.repo, name, revision=model.commit, etag_timeout=TIMEOUT_S, tqdm_class=None
        )
    return Path(place)


@contextmanager
def stream(model: PinnedModel, name: str, *, start: int, stop: int) -> Iterator[httpx2.Response]:
    """Ask for the bytes [start, stop) of a file; the answer's body has not been read yet.

    Redirects are followed; the token goes to the hub alone.
    """
    url = hf_hub_url(model.ref.repo, name, revision=model.commit)
    headers = build_hf_headers(library_name="moec", library_version=__version__)
    headers |= {"Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
    with get_session().stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S
    ) as response:
        hf_raise_for_status(response)
        yield response


def answer_bytes(model: PinnedModel, name: str, *, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file, a few; fewer where the file ends before.

    Raises:
        HubError: they cannot be had.
    """
    with telling(model.ref), stream(model, name, start=start, stop=stop) as response:
        # A server that knows no ranges sends everything, of which only the beginning is read.
        skip = 0 if response.status_code == 206 else start
        taken = bytearray()
        for chunk in response.iter_bytes(chunk_size=64 * 1024):
            taken += chunk
            if len(taken) >= skip + stop - start:
                break
    return bytes(taken[skip : skip + stop - start])


@contextmanager
def telling(ref: HubRef, *, writing: bool = False) -> Iterator[None]:
    """Turn what huggingface-hub and its HTTP client raise into one line each."""
    try:
        yield
    except (httpx2.HTTPError, OfflineModeIsEnabled, EntryNotFoundError, HFValidationError) as one:
        raise HubError(f"{ref}: {_meaning(ref, one, writing)}") from None
    # What huggingface-hub stumbles over in an answer that is no JSON, or lacks a field.
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        raise HubError(
            f"{ref}: {constants.ENDPOINT} gives no answer that makes sense: is it a hub? "
            f"({type(problem).__name__})"
        ) from None


def _meaning(ref: HubRef, problem: Exception, writing: bool) -> str:
    """What went wrong and what to do about it, without a word of the server's."""
    way_in = "log in with `hf auth login` or set HF_TOKEN"
    endpoint = constants.ENDPOINT
    status = problem.response.status_code if isinstance(problem, HfHubHTTPError) else None
    if writing and (status in (401, 403) or isinstance(problem, RepositoryNotFoundError)):
        return f"{endpoint} does not let you write there; {way_in} with the right to write"
    if isinstance(problem, GatedRepoError):
        return f"gated: accept its terms at {endpoint}/{ref.repo}, and {way_in} of that account"
    if isinstance(problem, RevisionNotFoundError):
        return f"the model is there, but no revision '{ref.revision}'"
    if isinstance(problem, RepositoryNotFoundError):
        if get_token():
            return "no such folder, and no such model on the hub, or one your token does not open"
        return f"no such folder, and no such model on the hub, or a private one: then {way_in}"
    if isinstance(problem, OfflineModeIsEnabled):
        return "not all of it is in the cache, and HF_HUB_OFFLINE is set; unset it to download"
    if isinstance(problem, EntryNotFoundError):
        return "a file that the hub listed is not there any more, or cannot be reached; try again"
    if isinstance(problem, HFValidationError):
        return "not a name that the hub allows"
    if status == 401:
        return f"{endpoint} does not accept the token: expired or mistyped; {way_in}"
    if status == 403:
        return "the token may not read this model; give it the right to, or use another"
    if status is not None:
        return f"{endpoint} answered {status}; try again later"
    if writing:
        return f"{endpoint} cannot be reached ({type(problem).__name__}); try again later"
    return (
        f"no such folder, and {endpoint} cannot be reached ({type(problem).__name__}); models in "
        "the cache can be used with HF_HUB_OFFLINE=1"
    )


def _remote_file(ref: HubRef, entry: RepoFile) -> RemoteFile:
    num_bytes = entry.size if entry.lfs is None else entry.lfs.size
    digest = entry.blob_id if entry.lfs is None else entry.lfs.sha256
    well_formed = isinstance(digest, str) and (_SHA256 if entry.lfs else _COMMIT).fullmatch(digest)
    if not well_formed or not isinstance(num_bytes, int) or not 0 <= num_bytes <= MAX_FILE_BYTES:
        raise HubError(f"{ref}: the hub lists {entry.path} with an impossible size or digest")
    return RemoteFile(entry.path, num_bytes, digest)


def storage_of(ref: HubRef) -> Path:
    """Where the cache keeps a repository."""
    return Path(constants.HF_HUB_CACHE) / f"models--{ref.repo.replace('/', '--')}"


def _cached_commit(ref: HubRef) -> str:
    """What the cache remembers of a revision."""
    if _COMMIT.fullmatch(ref.revision):
        return ref.revision
    try:
        commit = (storage_of(ref) / "refs" / ref.revision).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        commit = ""
    if not _COMMIT.fullmatch(commit):
        raise HubError(f"{ref}: not in the cache, and HF_HUB_OFFLINE is set; unset it to download")
    return commit

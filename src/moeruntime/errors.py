"""Every error moec raises on purpose.

::

    MoecError                      exit code 1   something inside moec went wrong
    ├── UsageError                 exit code 2   the call itself makes no sense
    ├── InputError                 exit code 3   a file or value handed in is bad
    │   ├── CheckpointError                      a checkpoint folder, its shards or its config
    │   ├── TokenizerError                       a tokenizer or a chat template
    │   └── RequestError                         a request an engine cannot serve
    ├── HubError                   exit code 4   the hub cannot be reached, or refuses
    ├── IntegrityError             exit code 5   a pack or a download is not what it should be
    └── ResourceError              exit code 6   memory, disk or device is missing

Each message is one line that names the file, the value and the way out. Exit codes 130 and 143 are
the signals'.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "HubError",
    "InputError",
    "IntegrityError",
    "MoecError",
    "RequestError",
    "ResourceError",
    "TokenizerError",
    "UsageError",
]


class MoecError(Exception):
    """Root of the tree; `exit_code` is what the command line ends with."""

    exit_code: int = 1


class UsageError(MoecError):
    """The arguments contradict each other or are out of range."""

    exit_code = 2


class InputError(MoecError):
    """A file or a value from outside is not usable."""

    exit_code = 3


class CheckpointError(InputError):
    """A checkpoint folder is incomplete, malformed or incompatible with the others."""


class TokenizerError(InputError):
    """A tokenizer or chat template is missing, malformed or misbehaves."""


class RequestError(InputError):
    """A request names an unknown variant, or does not fit the model."""


class HubError(MoecError):
    """The hub cannot be reached, does not have what was asked for, or refuses to give it."""

    exit_code = 4


class IntegrityError(MoecError):
    """A pack does not hold what its manifest says, or a download what the hub lists."""

    exit_code = 5


class ResourceError(MoecError):
    """Memory, disk or an accelerator does not suffice."""

    exit_code = 6

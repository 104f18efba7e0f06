"""What a command can save of the second that loading torch takes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["undisturbed_imports"]


@contextmanager
def undisturbed_imports() -> Iterator[None]:
    """Import without looking for garbage meanwhile, or in what was imported ever after.

    Modules make many objects and no garbage: looking for it takes a sixth of importing torch.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

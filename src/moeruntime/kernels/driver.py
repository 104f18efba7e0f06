"""The CUDA driver, called without anything between."""

from __future__ import annotations

import ctypes
from functools import cache

__all__ = ["chains", "check_driver", "driver"]

_CHAINS_IN_GRAPHS = 12030
"""Version of the driver that first captures such launches."""


@cache
def driver() -> ctypes.CDLL:
    """The library that came with the device's driver."""
    return ctypes.CDLL("libcuda.so.1")


@cache
def chains(capability: tuple[int, int]) -> bool:
    """Whether a kernel can be put in place while the one before it ends, in graphs too."""
    version = ctypes.c_int()
    check_driver(driver().cuDriverGetVersion(ctypes.byref(version)))
    return capability >= (9, 0) and version.value >= _CHAINS_IN_GRAPHS


def check_driver(status: int) -> None:
    """Say what a call of the driver found wrong.

    Raises:
        RuntimeError: the status is not that of success.
    """
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown').decode()}")

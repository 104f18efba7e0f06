"""The CUDA driver, called without anything between."""

from __future__ import annotations

import ctypes
from functools import cache

__all__ = ["check_driver", "driver"]


@cache
def driver() -> ctypes.CDLL:
    """The library that came with the device's driver."""
    return ctypes.CDLL("libcuda.so.1")


def check_driver(status: int) -> None:
    """Say what a call of the driver found wrong.

    Raises:
        RuntimeError: the status is not that of success.
    """
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown').decode()}")

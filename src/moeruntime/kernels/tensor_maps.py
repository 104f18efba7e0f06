"""What a Hopper device's copy engine has to know of a matrix in memory to fetch boxes of it."""

from __future__ import annotations

import ctypes

from moeruntime.kernels.driver import check_driver, driver

__all__ = ["MAP_BYTES", "NO_MAP", "encode_map"]

MAP_BYTES = 128

BOX_BYTES, BOX_ROWS = 128, 32
"""Of a box: bytes of each row, and rows."""

NO_MAP = bytes(MAP_BYTES)
"""For a matrix that there is not."""

_UINT8, _NO_INTERLEAVE, _SWIZZLE_128, _PROMOTE_TO_128, _FILL_ZEROS = 0, 0, 3, 2, 0


def encode_map(address: int, num_rows: int, row_bytes: int) -> bytes:
    """The map of a matrix of bytes; its boxes lie in shared memory as `nested_hopper.cuh` has them.

    Args:
        address: on the device; a multiple of 16.
        num_rows, row_bytes: rows follow each other; their bytes are a multiple of 16.

    Raises:
        RuntimeError: the driver refuses.
    """
    space = ctypes.create_string_buffer(MAP_BYTES + 64)
    aligned = ctypes.addressof(space) + (-ctypes.addressof(space)) % 64
    check_driver(
        driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(aligned),
            _UINT8,
            2,
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * 2)(row_bytes, num_rows),
            (ctypes.c_uint64 * 1)(row_bytes),
            (ctypes.c_uint32 * 2)(BOX_BYTES, BOX_ROWS),
            (ctypes.c_uint32 * 2)(1, 1),
            _NO_INTERLEAVE,
            _SWIZZLE_128,
            _PROMOTE_TO_128,
            _FILL_ZEROS,
        )
    )
    return ctypes.string_at(aligned, MAP_BYTES)

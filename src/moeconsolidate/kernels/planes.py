"""Packing codes, as `moeruntime.codes.planes` defines it. Legend: R rows, C columns, J bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeconsolidate.kernels.jit import kernel

__all__ = ["pack_plane"]

WORD_BYTES = 8
EVERY_BYTE = np.uint64(0x0101010101010101)


def pack_plane(codes_RC: Any, above: int, width: int, plane_RJ: Any) -> None:
    """Fill one plane.

    Args:
        codes_RC: uint8.
        above: bits of each code below those of the plane.
        width: bits of each code in the plane.
        plane_RJ: uint8.
    """
    if codes_RC.shape[1] % WORD_BYTES == plane_RJ.shape[1] % WORD_BYTES == 0:
        # No bit leaves its byte, so eight are moved at once.
        codes_RC, plane_RJ = codes_RC.view(np.uint64), plane_RJ.view(np.uint64)
    _pack(codes_RC, np.uint64(above), np.uint64(width), plane_RJ)


@kernel
def _pack(codes_RC: Any, above: Any, width: Any, plane_RJ: Any) -> None:
    """The same on bytes, or words of them."""
    num_rows, num_columns = codes_RC.shape
    row_size = plane_RJ.shape[1]
    mask = ((np.uint64(1) << width) - np.uint64(1)) * EVERY_BYTE
    for r in range(num_rows):
        for j in range(row_size):
            plane_RJ[r, j] = 0
        for first in range(0, num_columns, row_size):
            shift = np.uint64(first // row_size) * width
            field_J = codes_RC[r, first : min(first + row_size, num_columns)]
            for j in range(len(field_J)):
                plane_RJ[r, j] |= ((field_J[j] >> above) & mask) << shift

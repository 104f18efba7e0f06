"""Packing codes, as `moeruntime.codes.planes` defines it. Legend: R rows, C columns, J bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeconsolidate.kernels.jit import kernel

__all__ = ["pack_plane"]


@kernel
def pack_plane(codes_RC: Any, above: int, width: int, plane_RJ: Any) -> None:
    """Fill one plane.

    Args:
        codes_RC: uint8.
        above: bits of each code below those of the plane.
        width: bits of each code in the plane.
        plane_RJ: uint8.
    """
    num_rows, num_columns = codes_RC.shape
    row_bytes, mask = plane_RJ.shape[1], (1 << width) - 1
    for r in range(num_rows):
        plane_J = plane_RJ[r]
        plane_J[:] = np.uint8(0)
        for first in range(0, num_columns, row_bytes):
            field_J = codes_RC[r, first : min(first + row_bytes, num_columns)]
            shift = first // row_bytes * width
            for j in range(len(field_J)):
                plane_J[j] |= np.uint8(((field_J[j] >> above) & mask) << shift)

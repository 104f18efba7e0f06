"""Codes of a few bits in bytes, in the order a kernel can use without shuffling.

A code of b bits is cut into planes of 4, 2 and 1 bits, high bits first (3 bits: a plane of 2, then
one of 1). A plane of w bits stores a row of C codes in J = ceil(C * w / 8) bytes: field p of
byte j, counted from the low bits, is the code of column p * J + j. So one mask turns a run of bytes
into a run of neighbouring columns, each a byte that is a known multiple of its code, which is what
integer matrix units take; and scales that cover a run cover it in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["MAX_BITS", "pack_planes", "plane_bytes", "plane_shapes", "unpack_planes"]

BYTE_BITS = 8
MAX_BITS = 7
_WIDTHS = (4, 2, 1)


def plane_shapes(num_rows: int, num_columns: int, bits: int) -> dict[int, tuple[int, int]]:
    """Width of each plane -> its shape [rows, bytes]; empty for 0 bits."""
    return {
        width: (num_rows, -(-num_columns * width // BYTE_BITS)) for width in _WIDTHS if bits & width
    }


def plane_bytes(num_rows: int, num_columns: int, bits: int) -> int:
    """Bytes of all planes of a matrix of codes."""
    return sum(
        rows * row_bytes for rows, row_bytes in plane_shapes(num_rows, num_columns, bits).values()
    )


def pack_planes(codes_RC: Tensor, bits: int) -> dict[int, Tensor]:
    """Cut codes into planes.

    Args:
        codes_RC: uint8, each below 2**bits.
        bits: 0 to 7.

    Returns:
        Width -> uint8 of `plane_shapes`; columns past the last are 0.
    """
    assert 0 <= bits <= MAX_BITS
    num_rows, num_columns = codes_RC.shape
    planes = {}
    above = bits
    for width, (_, row_bytes) in plane_shapes(num_rows, num_columns, bits).items():
        above -= width
        fields_RC = codes_RC >> above if above else codes_RC
        if above + width < bits:
            fields_RC = fields_RC & (2**width - 1)
        plane = torch.zeros(num_rows, row_bytes, dtype=torch.uint8, device=codes_RC.device)
        for number, start in enumerate(range(0, num_columns, row_bytes)):
            run_RJ = fields_RC[:, start : start + row_bytes]
            plane[:, : run_RJ.shape[1]] |= run_RJ << number * width
        planes[width] = plane
    return planes


def unpack_planes(planes: Mapping[int, Tensor], num_columns: int) -> Tensor:
    """Put planes together again; the inverse of `pack_planes`.

    Returns:
        int32 codes [rows, num_columns] on the planes' device.
    """
    assert planes, "0 bits have no planes to take the number of rows from"
    codes: Tensor | None = None
    for width in sorted(planes, reverse=True):
        plane = planes[width].to(torch.int32)
        shifts = torch.arange(0, BYTE_BITS, width, dtype=torch.int32, device=plane.device)
        fields = (plane[:, None, :] >> shifts[:, None]) & (2**width - 1)
        fields = fields.flatten(1)[:, :num_columns]
        codes = fields if codes is None else (codes << width) | fields
    assert codes is not None
    return codes

"""How planes of codes lie on the device for `nested_fast`. Imports no Triton.

A file has a plane's rows one after the other. A program reads 128 bytes of some dozens of rows at
a time: pieces that small, of rows that lie far apart, take longer than a run of memory does. So on
the device a plane is a row of *strips*: the first 128 bytes of all rows, then the next. In
gate_up's planes 16 neurons' rows of gate_proj are followed by their rows of up_proj, so that one
run has both. Of every other row of a strip the halves are exchanged, as shared memory wants it.

Legend: S matrices, R rows, J bytes of a row.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["lay_in_strips"]

STRIP_BYTES, STRIP_ROWS = 128, 32
"""Bytes that a strip has of each row, and rows that belong together: 16 of each projection."""


def lay_in_strips(plane_SRJ: Tensor, *, is_gate_up: bool) -> None:
    """Put matrices of bytes in strips, each in its own place.

    Args:
        plane_SRJ: uint8 and contiguous; R is a multiple of 32, J of 128.
        is_gate_up: the first half of the rows is gate_proj's, the other one up_proj's.
    """
    assert plane_SRJ.is_contiguous()
    num_rows, num_bytes = plane_SRJ.shape[1:]
    half = STRIP_ROWS // 2
    for plane_RJ in plane_SRJ:  # one by one, since it takes as much memory again
        rows = plane_RJ
        if is_gate_up:
            rows = plane_RJ.view(2, -1, half, num_bytes).transpose(0, 1)
        halves = rows.reshape(num_rows // 2, 2, -1, 2, STRIP_BYTES // 2).permute(2, 0, 1, 3, 4)
        halves = halves.contiguous()
        halves[:, :, 1] = halves[:, :, 1].flip(2)
        plane_RJ.copy_(halves.view(num_rows, num_bytes))

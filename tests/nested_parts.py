"""Random nested codes of some faces, as kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeruntime.codes import NestedCode, PrivateCode, decode, pack_planes, scale_columns
from moeruntime.kernels.face_parts import FacePart
from moeruntime.kernels.strips import lay_in_strips

__all__ = ["Faces", "RandomPart", "random_part"]

Faces = tuple[tuple[int, PrivateCode], ...]
"""The slot and the private code of each."""


@dataclass(frozen=True, slots=True)
class RandomPart:
    """Codes, what they decode to, and the private planes, which must live as long."""

    part: FacePart
    decoded_FRC: Tensor
    alive: list[Tensor]


def random_part(
    rows: int,
    columns: int,
    faces: Faces,
    code: NestedCode,
    *,
    seed: int,
    device: torch.device,
    is_gate_up: bool,
    in_strips: bool = False,
) -> RandomPart:
    """Matrices of all slots that faces have."""
    generator = torch.Generator(device).manual_seed(seed)
    slots = 1 + max(slot for slot, _ in faces)

    def codes(bits: int, *shape: int) -> Tensor:
        return torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8, device=device)

    shared = codes(code.shared_bits, slots, rows, columns)
    scale_shape = slots, rows, scale_columns(columns, code.group)
    scale = torch.rand(scale_shape, generator=generator, device=device) * 0.001
    scale = (scale + 0.0005).bfloat16()
    packed = [pack_planes(one, code.shared_bits) for one in shared]
    planes = {width: torch.stack([one[width] for one in packed]) for width in packed[0]}
    decoded, table = [], []
    alive: list[Tensor] = []
    for slot, one in faces:
        private = codes(one.bits, rows, columns) if one.bits else None
        own = pack_planes(private, one.bits) if private is not None else {}
        alive += own.values()
        at = [own[width].data_ptr() if width in own else 0 for width in (4, 2, 1)]
        table.append([slot, one.bits, one.step, *at])
        decoded.append(decode(shared[slot], scale[slot], code, private, one))
    if in_strips:
        for plane in (*planes.values(), *(one[None] for one in alive)):
            lay_in_strips(plane, is_gate_up=is_gate_up)
    part = FacePart(
        rows,
        columns,
        code.shared_bits,
        code.group,
        planes,
        scale,
        torch.tensor(table, device=device),
        num_planes=max((one.bits & 1) + (one.bits >= 2) for _, one in faces),
        wide=any(one.bits == 4 for _, one in faces),
        is_gate_up=is_gate_up,
        in_strips=in_strips,
    )
    return RandomPart(part, torch.stack(decoded), alive)

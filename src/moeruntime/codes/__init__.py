"""How expert weights are stored: plain floats, or nested codes of shared and private bits."""

from moeruntime.codes.nested import (
    NestedCode,
    PrivateCode,
    decode,
    decode_planes,
    nested_bytes,
    scale_columns,
)
from moeruntime.codes.planes import pack_planes, plane_bytes, plane_shapes, unpack_planes

__all__ = [
    "NestedCode",
    "PrivateCode",
    "decode",
    "decode_planes",
    "nested_bytes",
    "pack_planes",
    "plane_bytes",
    "plane_shapes",
    "scale_columns",
    "unpack_planes",
]

"""The pack: the artifact the compiler writes and the runtime serves."""

from moeruntime.pack.manifest import FORMAT_VERSION, Manifest, TensorRef, Variant
from moeruntime.pack.reader import Pack
from moeruntime.pack.source import WeightSource
from moeruntime.pack.verify import verify_pack

__all__ = [
    "FORMAT_VERSION",
    "Manifest",
    "Pack",
    "TensorRef",
    "Variant",
    "WeightSource",
    "verify_pack",
]

"""The pack: the artifact the compiler writes and the runtime serves."""

from moeruntime.pack.manifest import FORMAT_VERSION, Manifest, TensorRef, Variant
from moeruntime.pack.reader import Pack
from moeruntime.pack.source import MadeTensor, StoredTensor, WeightSource
from moeruntime.pack.verify import verify_pack

__all__ = [
    "FORMAT_VERSION",
    "MadeTensor",
    "Manifest",
    "Pack",
    "StoredTensor",
    "TensorRef",
    "Variant",
    "WeightSource",
    "verify_pack",
]

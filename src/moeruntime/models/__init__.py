"""The networks, written against resident slots and expert slots instead of modules."""

from moeruntime.models.batch import Batch
from moeruntime.models.decoder import Decoder, parameter_roles

__all__ = ["Batch", "Decoder", "parameter_roles"]

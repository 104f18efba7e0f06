"""The networks, written against resident slots and expert slots instead of modules."""

from moeruntime.models.batch import Batch
from moeruntime.models.decoder import Decoder
from moeruntime.models.encoder_decoder import EncoderDecoder
from moeruntime.models.parameters import parameter_roles

__all__ = ["Batch", "Decoder", "EncoderDecoder", "parameter_roles"]

"""Model families: how each names its tensors, reads its config and routes its tokens."""

from moeruntime.families.base import Activation, Family, ModelConfig
from moeruntime.families.decoder import DecoderConfig
from moeruntime.families.encoder_decoder import EncoderDecoderConfig
from moeruntime.families.mixtral import MIXTRAL
from moeruntime.families.switch import SWITCH

__all__ = [
    "FAMILIES",
    "Activation",
    "DecoderConfig",
    "EncoderDecoderConfig",
    "Family",
    "ModelConfig",
]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (MIXTRAL, SWITCH)}
"""Every family moec knows, by the `model_type` of its config.json."""

"""Model families: how each names its tensors, reads its config and routes its tokens."""

from moeruntime.families.base import EXPERT_ROLES, Family, ModelConfig
from moeruntime.families.mixtral import MIXTRAL

__all__ = ["EXPERT_ROLES", "FAMILIES", "Family", "ModelConfig"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (MIXTRAL,)}
"""Every family moec knows, by the `model_type` of its config.json."""

"""How a slot's weights follow from its members': one file a rule."""

from moeconsolidate.merging.average import average
from moeconsolidate.merging.base import MergeRule

__all__ = ["MERGE_RULES", "MergeRule"]

MERGE_RULES: dict[str, MergeRule] = {"average": average}
"""Every rule, by its name in a recipe."""

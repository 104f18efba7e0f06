"""What the models multiply by: parameters, each made of the rows of one or more stored roles."""

from __future__ import annotations

from moeruntime.families import ModelConfig

__all__ = ["parameter_roles"]

_JOINED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "cross_k_proj": ("cross_kv_proj", ("cross_k_proj", "cross_v_proj")),
}
"""Projections of one input, multiplied by at once: the first of them -> their name, all of them."""
_FOLLOW = {role for _, roles in _JOINED.values() for role in roles[1:]}


def parameter_roles(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """A model's non-expert parameters, each with the stored roles whose rows it concatenates.

    They are in the order of a forward pass.
    """
    parameters: dict[str, tuple[str, ...]] = {}
    for role in config.non_expert_shapes():
        block, _, name = role.rpartition(".")
        if name in _JOINED:
            joined, roles = _JOINED[name]
            parameters[f"{block}.{joined}"] = tuple(f"{block}.{one}" for one in roles)
        elif name not in _FOLLOW:
            parameters[role] = (role,)
    return parameters

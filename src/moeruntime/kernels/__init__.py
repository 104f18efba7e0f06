"""The operations whose speed decides the engine's.

`reference` is plain PyTorch on any device and the definition of right; whatever is added beside it
is chosen here, and must agree with it.
"""

from moeruntime.kernels.reference import (
    TokenGroup,
    activate,
    expert_mlp,
    grouped_linear,
    paged_attention,
    write_cache,
)

__all__ = [
    "TokenGroup",
    "activate",
    "expert_mlp",
    "grouped_linear",
    "paged_attention",
    "write_cache",
]

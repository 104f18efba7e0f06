"""The published rule: shared slots take turns among the models.

Imani et al., "QoS-Efficient Serving of Multiple Mixture-of-Expert LLMs Using Partial Runtime
Reconfiguration" (2025), https://arxiv.org/abs/2505.06481: of N models, shared slot i holds the
expert of model i mod N, as it is. There slots are numbered by the distance of their members; here
in the order of the layer, since layers are written one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moeconsolidate.merging.base import MergeRule, SlotContext

__all__ = ["RoundRobin"]


class RoundRobin(MergeRule):
    """Member i mod N of slot i, as it is."""

    def __call__(self, members: Sequence[Tensor], context: SlotContext, *, out: Tensor) -> Tensor:
        return members[context.slot % len(members)]

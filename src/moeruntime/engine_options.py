"""What an engine can be told, for those who pass it on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from moeruntime.waiting import WaitingRoom

__all__ = ["DEFAULT_MAX_SEQUENCES", "DEFAULT_MAX_STEP_TOKENS", "EngineOptions"]

DEFAULT_MAX_SEQUENCES = 32
DEFAULT_MAX_STEP_TOKENS = 2048


class EngineOptions(TypedDict, total=False):
    """The keyword arguments of `Engine`, which explains them."""

    device: str
    dtype: str
    resident: int | None
    max_sequences: int
    max_step_tokens: int
    cache_bytes: int | None
    kept_layers: int | None
    prefix_cache: bool
    waiting: WaitingRoom | None
    on_progress: Callable[[str], None] | None

"""Compile fine-tuned mixture-of-experts checkpoints into one pack, and take variants out again.

    from moeconsolidate import consolidate, export_variant

    result = consolidate(["base=mini-base", "math=mini-math"], "pack", threshold=0.9)
    print(result.plan.num_slots)
    export_variant("pack", "math", "math-again")

Importing this package is cheap: torch and SciPy are loaded when the first of these names is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["ConsolidationResult", "consolidate", "export_variant"]

if TYPE_CHECKING:
    from moeconsolidate.export import export_variant
    from moeconsolidate.pipeline import ConsolidationResult, consolidate

_HOMES = {
    "ConsolidationResult": "pipeline",
    "consolidate": "pipeline",
    "export_variant": "export",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

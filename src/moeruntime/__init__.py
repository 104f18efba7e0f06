"""Serve every variant of a pack from one device.

    from moeruntime import Engine, Request

    engine = Engine.from_pack("pack/")
    for output in engine.generate([Request("math", "What is 3 + 4?", chat=True)]):
        print(output.text)

Importing this package is cheap: torch is loaded when the first of these names is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "MoecError",
    "Output",
    "Pack",
    "Request",
    "SamplingParams",
    "__version__",
    "verify_pack",
]

if TYPE_CHECKING:
    from moeruntime.engine import Engine
    from moeruntime.errors import MoecError
    from moeruntime.pack import Pack, verify_pack
    from moeruntime.request import Output, Request, SamplingParams

_HOMES = {
    "Engine": "engine",
    "MoecError": "errors",
    "Output": "request",
    "Pack": "pack",
    "Request": "request",
    "SamplingParams": "request",
    "verify_pack": "pack",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

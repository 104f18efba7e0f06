"""How kernels are compiled: once for each machine where that can be kept, else once a process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.extending import intrinsic

__all__ = ["floor", "fused", "kernel", "nearest"]


def kernel(function: Callable[..., Any], *, reassociate: bool = False) -> Callable[..., Any]:
    """Compile a function for numba when it is first called.

    Sums have the order that its loops say, on any machine, unless `reassociate` is set.

    Machine code is kept beside the source or, where that is read-only, in the user's cache folder
    (NUMBA_CACHE_DIR names another). Where neither can be written it is made anew: a cache saves
    seconds, and is no reason to fail.
    """
    compiled: Any = njit(
        nogil=True,
        error_model="numpy",
        fastmath={"reassoc", "contract", "nsz"} if reassociate else False,
    )(function)
    with suppress(RuntimeError):  # nowhere to keep it
        compiled._cache = _Cache(function)
    return compiled  # type: ignore[no-any-return]


class _Cache(FunctionCache):
    """Numba's, but for two things.

    Kernels are compiled into those that call them, so a change of any makes all that was kept
    stale. And a full disk or a damaged file costs the time of compiling, no more.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        own = self._impl.locator.get_source_stamp()
        self._cache_file = IndexDataCacheFile(
            self._cache_path, self._impl.filename_base, (own, _stamps_of_kernels())
        )

    def load_overload(self, sig: object, target_context: object) -> Any:
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception:  # whatever a pickle that somebody cut short may raise
            return None

    def save_overload(self, sig: object, data: object) -> None:
        with suppress(Exception):
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]


@cache
def _stamps_of_kernels() -> list[tuple[str, int, int]]:
    """What changes when the source of a kernel does."""
    files = [(path.name, path.stat()) for path in sorted(Path(__file__).parent.glob("*.py"))]
    return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in files]


def _fused(typing: object, factor: object, other: object, summand: object) -> Any:
    """The sum of factor * other and summand in float32, rounded once."""

    def generate(_: object, builder: Any, __: object, values: Any) -> Any:
        return builder.fma(*values)

    return types.float32(types.float32, types.float32, types.float32), generate


def _rounded(operation: str) -> Any:
    """An operation of LLVM that rounds a float32 to an integer: one instruction, mostly."""

    def declare(typing: object, x: object) -> Any:
        def generate(_: object, builder: Any, __: object, values: Any) -> Any:
            made = builder.module.declare_intrinsic(operation, [ir.FloatType()])
            return builder.call(made, values)

        return types.float32(types.float32), generate

    return intrinsic(declare)


fused: Any = intrinsic(_fused)

floor: Any = _rounded("llvm.floor")

nearest: Any = _rounded("llvm.rint")
"""To the nearest integer, ties to even."""

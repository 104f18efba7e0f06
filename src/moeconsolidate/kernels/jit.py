"""How kernels are compiled: once for each machine where that can be kept, else once a process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from numba import njit, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

__all__ = ["fused", "kernel"]


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
        compiled._cache = _Cache(function)  # type: ignore[no-untyped-call]
    return compiled  # type: ignore[no-any-return]


class _Cache(FunctionCache):
    """Numba's, except that a full disk or a damaged file costs the time of compiling, no more."""

    def load_overload(self, sig: object, target_context: object) -> Any:
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception:  # whatever a pickle that somebody cut short may raise
            return None

    def save_overload(self, sig: object, data: object) -> None:
        with suppress(Exception):
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]


def _fused(typing: object, factor: object, other: object, summand: object) -> Any:
    """The sum of factor * other and summand in float32, rounded once."""

    def generate(_: object, builder: Any, __: object, values: Any) -> Any:
        return builder.fma(*values)

    return types.float32(types.float32, types.float32, types.float32), generate


fused: Any = intrinsic(_fused)

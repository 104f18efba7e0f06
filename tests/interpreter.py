"""Triton's interpreter as the tests use it: kernels' own source, run on a CPU by NumPy.

Programs run one after the other, in an order that is drawn anew for each launch, and whatever they
read or write has to lie in a tensor that they were given. A kernel that is launched before the one
in front of it has ended has to wait for it before it writes, or reads what that one wrote.
`install` puts this in place, and what stands in for CUDA.

What it can't show: speed, what compilers for devices make of a kernel, and programs that really run
at once.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import cuda_stand_ins

__all__ = ["Launches", "choose_interpreter", "install", "is_chosen"]

VARIABLE = "TRITON_INTERPRET"

NOWHERE: NDArray[np.uint64] = np.empty(0, np.uint64)


def choose_interpreter() -> None:
    """Where there is no CUDA device. Triton looks once, when it is imported."""
    if not torch.cuda.is_available():
        os.environ[VARIABLE] = "1"


def is_chosen() -> bool:
    """Whether kernels run on a CPU here; Triton is made for Linux."""
    return os.environ.get(VARIABLE) == "1" and importlib.util.find_spec("triton") is not None


class Launches:
    """What kernels may touch, and in which order their programs run."""

    def __init__(self) -> None:
        self._numbers = random.Random(0)
        self._allowed: list[Tensor] = []
        self._starts = NOWHERE
        self._stops = self._starts
        self._order: list[tuple[int, int, int]] = []
        self._next = 0
        self._has_to_wait = False
        self._waited = True
        self._written: list[NDArray[np.uint64]] = []  # by this kernel
        self._not_yet = NOWHERE  # what the one before it wrote, in order

    def allow(self, tensors: Iterable[Tensor]) -> None:
        """Let kernels touch these, whose addresses they find in other tensors."""
        self._allowed += tensors

    @contextmanager
    def launch(self, arguments: Iterable[object], *, chained: bool) -> Iterator[None]:
        """Watch one; `arguments` are all that it was given."""
        given = [argument for argument in arguments if isinstance(argument, Tensor)]
        runs = sorted(_run_of(tensor) for tensor in (*given, *self._allowed) if tensor.numel())
        merged: list[list[int]] = []
        for start, stop in runs:
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(stop, merged[-1][1])
            else:
                merged.append([start, stop])
        bounds = np.array(merged, dtype=np.uint64).reshape(-1, 2)
        self._starts, self._stops = bounds[:, 0].copy(), bounds[:, 1].copy()
        self._has_to_wait, self._waited = chained, True
        self._not_yet = np.sort(np.concatenate([NOWHERE, *self._written]))
        self._written = []
        with np.errstate(all="ignore"):  # a GPU says nothing of what a mask then leaves out
            yield
        assert self._waited, "a program has not waited"

    def order(self, size: tuple[int, int, int]) -> None:
        """Draw the order of programs."""
        self._order = [(x, y, z) for x, y, z in np.ndindex(size)]
        self._numbers.shuffle(self._order)
        self._next = 0

    def next_program(self) -> tuple[int, int, int]:
        """The program to run now."""
        assert self._waited, "a program has not waited"
        self._waited = not self._has_to_wait
        program = self._order[self._next]
        self._next += 1
        return program

    def wait(self) -> None:
        """What `gdc_wait` does on a device."""
        self._waited = True

    def touch(
        self, pointers: NDArray[np.uint64], mask: NDArray[np.bool_], num_bytes: int, *, writes: bool
    ) -> None:
        """Refuse addresses that are nobody's, or not to be touched yet."""
        assert self._waited or not writes, "memory is written before what came before is complete"
        pointers, mask = np.broadcast_arrays(pointers, mask)
        wanted = pointers[mask.astype(bool)]
        if not len(wanted):
            return
        if writes:
            self._written.append(wanted)
        if not self._waited and len(self._not_yet):
            nearest = np.searchsorted(self._not_yet, wanted).clip(max=len(self._not_yet) - 1)
            early = self._not_yet[nearest] == wanted
            assert not early.any(), "memory is read before what came before is complete"
        assert len(self._starts), "there is nothing to be touched"
        run = np.searchsorted(self._starts, wanted, side="right").astype(np.int64) - 1
        inside = (run >= 0) & (wanted + np.uint64(num_bytes) <= self._stops[run])
        assert inside.all(), f"{int((~inside).sum())} of {len(wanted)} addresses are nobody's"


def _run_of(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a view and the one past its last."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def install(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Put it all in place for a test that launches kernels on CPU tensors."""
    launches = Launches()
    cuda_stand_ins.install(monkeypatch, capability=(9, 0))
    _watch(monkeypatch, launches)
    _mend(monkeypatch)
    return launches


def _watch(monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    import triton.language.extra.cuda as device_functions
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    builder: Any = InterpreterBuilder
    load, store, atomic = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
    )
    set_size, set_program = builder.set_grid_dim, builder.set_grid_idx
    run: Callable[..., None] = GridExecutor.__call__

    def touch(pointers: Any, mask: Any, *, writes: bool) -> None:
        num_bytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        launches.touch(pointers.data, mask.data, num_bytes, writes=writes)

    def watched_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        touch(pointers, mask, writes=False)
        return load(self, pointers, mask, *others)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        touch(pointers, mask, writes=True)
        return store(self, pointers, value, mask, *others)

    def watched_atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *o: Any) -> Any:
        touch(pointers, mask, writes=True)
        return atomic(self, op, pointers, value, mask, *o)

    def in_some_order(self: Any, *size: int) -> None:
        launches.order((size[0], size[1], size[2]))
        set_size(self, *size)

    def next_program(self: Any, *_: int) -> None:
        set_program(self, *launches.next_program())

    def watched_run(self: Any, *arguments: Any, **keywords: Any) -> None:
        given = (*arguments, *keywords.values())
        with launches.launch(given, chained=bool(keywords.get("launch_pdl"))):
            run(self, *arguments, **keywords)

    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)
    monkeypatch.setattr(builder, "create_atomic_rmw", watched_atomic)
    monkeypatch.setattr(builder, "set_grid_dim", in_some_order)
    monkeypatch.setattr(builder, "set_grid_idx", next_program)
    monkeypatch.setattr(GridExecutor, "__call__", watched_run)
    monkeypatch.setattr(device_functions, "gdc_wait", launches.wait)
    monkeypatch.setattr(device_functions, "gdc_launch_dependents", lambda: None)


def _mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make bfloat16 what it is on a device, and the interpreter three times as fast.

    It cuts numbers off where a device rounds to the nearest, and multiplies their bits as integers.
    For every call of a function it would put its own in place of the language's, all of them; here
    that is done once a launch. Sums of integers are not looked at again, since small ones fit.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder

    builder: Any = InterpreterBuilder
    cast, dot, run = builder.cast_impl, builder.create_dot, GridExecutor.__call__

    def mended_cast(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            data = rounded.view(torch.uint16).numpy().reshape(source.data.shape)
        elif kinds == (tl.bfloat16, tl.float32):
            data = (source.data.astype(np.uint32) << 16).view(np.float32)
        else:
            assert tl.bfloat16 not in kinds, "another number would come out"
            return cast(self, source, target)
        return interpreter.TensorHandle(data, kinds[1])

    def mended_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (
            self.cast_impl(one, tl.float32) if one.dtype.scalar == tl.bfloat16 else one
            for one in (a, b)
        )
        return dot(self, a, b, *others)

    def mended_run(self: Any, *arguments: Any, **keywords: Any) -> None:
        library: Any = tl.standard.sum  # like kernels, functions of the library call the language's
        in_place = interpreter._patch_lang(library.fn)
        try:
            run(self, *arguments, **keywords)
        finally:
            in_place.restore()

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return self.rewrite()(*arguments, **keywords)

    unchecked = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", unchecked)
    monkeypatch.setattr(builder, "cast_impl", mended_cast)
    monkeypatch.setattr(builder, "create_dot", mended_dot)
    monkeypatch.setattr(GridExecutor, "__call__", mended_run)
    monkeypatch.setattr(InterpretedFunction, "__call__", call)

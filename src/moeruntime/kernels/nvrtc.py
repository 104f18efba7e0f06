"""CUDA C++ compiled when it is needed, by the compiler library that torch ships.

For what Triton cannot express: which lane holds which operand of a matrix product.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moeruntime.errors import ResourceError
from moeruntime.kernels.driver import chains, check_driver, driver
from moeruntime.kernels.image_cache import ImageCache

__all__ = ["Kernel", "compile_images", "compile_kernel", "parameters"]


PLAIN_SHARED_BYTES = 48 * 1024
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of those that are a number."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("padding", ctypes.c_uint),
        ("value", ctypes.c_int),
        ("rest_of_value", ctypes.c_char * 60),
    )


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Kernel:
    """A function on the device, launched on the current stream; captured like any other launch.

    Where the device can, it is put in place while the kernel before it ends (see `chain`): what it
    does first is `begin` of `chain.cuh`.
    """

    def __init__(self, handle: ctypes.c_void_p, capability: tuple[int, int]) -> None:
        """Wrap what the driver calls a function, on a device of such a capability."""
        self._handle = handle
        self._shared_bytes = PLAIN_SHARED_BYTES
        chained = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._attributes = (_Attribute * 1)(chained)
        self._num_attributes = int(chains(capability))

    def __call__(
        self,
        grid: tuple[int, int, int],
        num_threads: int,
        arguments: Sequence[Tensor | int],
        *,
        shared_bytes: int,
    ) -> None:
        """Launch; tensors go as pointers, integers as 32 bits."""
        if shared_bytes > self._shared_bytes:  # more than a kernel gets unasked
            attribute = _MAX_DYNAMIC_SHARED_SIZE_BYTES
            check_driver(driver().cuFuncSetAttribute(self._handle, attribute, shared_bytes))
            self._shared_bytes = shared_bytes
        _values, pointers = parameters(arguments)
        launch = _Launch(
            grid,
            (num_threads, 1, 1),
            shared_bytes,
            torch.cuda.current_stream().cuda_stream,
            self._attributes,
            self._num_attributes,
        )
        check_driver(driver().cuLaunchKernelEx(ctypes.byref(launch), self._handle, pointers, None))


def parameters(
    arguments: Sequence[Tensor | int],
) -> tuple[list[ctypes.c_void_p | ctypes.c_int], ctypes.Array[ctypes.c_void_p]]:
    """What a launch is given: values, which must live as long, and where they are."""
    values = [
        ctypes.c_void_p(one.data_ptr()) if isinstance(one, Tensor) else ctypes.c_int(one)
        for one in arguments
    ]
    pointers = (ctypes.c_void_p * len(values))(
        *(ctypes.cast(ctypes.pointer(one), ctypes.c_void_p) for one in values)
    )
    return values, pointers


def compile_kernel(path: Path, name: str, defines: tuple[tuple[str, int], ...]) -> Kernel:
    """Compile a file's kernel for the current device, unless that was done before.

    What was compiled once is kept on disk (`ImageCache`), until sources or compiler change.

    Args:
        path: CUDA C++ that includes nothing but files beside it.
        name: an `extern "C"` kernel in it.
        defines: macros.

    Raises:
        ResourceError: there is no compiler library, or it refuses the file.
    """
    return _loaded(path, name, defines, torch.cuda.current_device())


def compile_images(wanted: Iterable[tuple[Path, tuple[tuple[str, int], ...]]]) -> None:
    """Compile kernels at once, several at a time, so that `compile_kernel` need not.

    Args:
        wanted: files and macros.

    Raises:
        ResourceError: as `compile_kernel`.
    """
    capability = torch.cuda.get_device_capability()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [pool.submit(_image, path, defines, capability) for path, defines in wanted]
        for one in made:
            one.result()


@cache
def _loaded(path: Path, name: str, defines: tuple[tuple[str, int], ...], device: int) -> Kernel:
    """A loaded module is the device's that it was loaded on."""
    capability = torch.cuda.get_device_capability(device)
    image = _image(path, defines, capability)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    torch.cuda.current_stream()  # makes sure that the device's context is current
    check_driver(driver().cuModuleLoadData(ctypes.byref(module), image))
    check_driver(driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    return Kernel(function, capability)


@cache
def _image(path: Path, defines: tuple[tuple[str, int], ...], capability: tuple[int, int]) -> bytes:
    library = _nvrtc()
    # With what this architecture alone has, as Hopper's products of warpgroups.
    own = "a" if capability[0] >= 9 else ""
    flags = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}{own}", "--std=c++17"]
    flags.append("--device-as-default-execution-space")  # as lambdas in lambdas need it
    flags += [f"-D{name}={value}" for name, value in defines]
    version = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(*map(ctypes.byref, version))
    images = ImageCache()
    key = repr((path.name, flags, [one.value for one in version], _sources(path.parent)))
    found = images.get(key)
    if found is not None:
        return found
    flags.append(f"--include-path={path.parent}")
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(
        ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None
    )
    array = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    status = library.nvrtcCompileProgram(program, len(flags), array)
    size = ctypes.c_size_t()
    if status:
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise ResourceError(f"{path.name} does not compile here: {log.value.decode()[:300]}")
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, image)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    images.put(key, image.raw)
    return image.raw


@cache
def _sources(folder: Path) -> str:
    """A digest of all kernels in a folder, which may include each other."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.cu*")):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


@cache
def _nvrtc() -> ctypes.CDLL:
    """The library beside torch, or one that the system finds."""
    major = str(torch.version.cuda).partition(".")[0]
    name = f"libnvrtc.so.{major}"
    beside = [
        file
        for place in sys.path
        for file in sorted(Path(place).glob(f"nvidia/*/lib/{name}"))
        if place
    ]
    for candidate in (*map(str, beside), name):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise ResourceError(f"{name} is missing, which torch {torch.__version__} usually brings along")

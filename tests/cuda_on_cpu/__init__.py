"""The project's CUDA kernels on a CPU, for tests where there is no device.

`install` has `nested_fast` launch kernels that were translated to C++ and compiled for this CPU:
their source as it is, with PTX instructions replaced by functions of `device.hpp`. Only what those
kernels use is there.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from moeruntime.kernels import nested_fast, nvrtc

__all__ = ["COMPILER", "install"]

HERE = Path(__file__).parent
KERNELS = Path(nvrtc.__file__).parent
COMPILER = shutil.which("g++")
MAX_SHARED_BYTES, MAX_THREADS = 227 * 1024, 1024

_FOLDER = tempfile.TemporaryDirectory(prefix="cuda_on_cpu-", ignore_cleanup_errors=True)

INSTRUCTIONS = {
    "mbarrier.init": "barrier_init",
    "@first mbarrier.arrive": "barrier_arrive_first",
    "mbarrier.arrive.expect_tx": "barrier_expect",
    "mbarrier.arrive": "barrier_arrive",
    "mbarrier.try_wait.parity": "barrier_wait",
    "cp.async.bulk.shared::cluster.global": "copy_bulk",
    "cp.async.cg.shared.global": "copy_async",
    "cp.async.commit_group": "nothing",  # all are waited for
    "cp.async.wait_group 0": "copy_wait_all",
    "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32": "warp_product",
    "lop3.b32 %0, %1, %2, %3, 0xE4": "select_bits",
    "fma.rn.bf16x2": "two_times_plus",
    "cvt.rn.bf16x2.f32": "two_rounded",
    "wgmma.fence": "nothing",
    "wgmma.commit_group": "products_commit",
    "wgmma.wait_group": "products_wait",
    "bar.sync 1": "meet_named",
    "fence.mbarrier_init": "nothing",
    "setmaxnreg": "nothing",
    "griddepcontrol": "nothing",
}
"""What an instruction begins with -> a function that takes its operands, results first."""

PRODUCT = """\
template <class Sum, int T> struct Product {
    static void start(Sum (&c)[4 * T], const u32 *a, u64 b, int add) {
        emulated::start_product<T>(c, a, b, add);
    }
};
"""

ENTRY = """\
template <class... Parameters> int count(void (*)(Parameters...)) { return sizeof...(Parameters); }
extern "C" int num_parameters() { return count(kernel); }
extern "C" const char *emulate(void **arguments, const unsigned *grid, int threads,
                               int shared_bytes, unsigned long long seed) {
    static std::string problem;
    try {
        emulated::launch(kernel, arguments, grid, threads, shared_bytes, seed);
        return nullptr;
    } catch (const emulated::Fail &found) {
        problem = found.what();
        return problem.c_str();
    }
}
"""


def install(monkeypatch: pytest.MonkeyPatch, *, num_multiprocessors: int) -> None:
    """Have `nested_fast` find a Hopper device of so many multiprocessors, which is this CPU."""
    if COMPILER is None:
        pytest.skip("needs g++")
    monkeypatch.setattr(nested_fast, "_device", lambda device: (num_multiprocessors, True))
    monkeypatch.setattr(nested_fast, "compile_kernel", _compile)


class _Kernel:
    """Launched as `nvrtc.Kernel` is; each launch schedules its threads otherwise."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._library.emulate.restype = ctypes.c_char_p
        self._seeds = itertools.count()

    def __call__(
        self,
        grid: tuple[int, int, int],
        num_threads: int,
        arguments: Sequence[Tensor | int],
        *,
        shared_bytes: int,
    ) -> None:
        assert shared_bytes <= MAX_SHARED_BYTES and 0 < num_threads <= MAX_THREADS
        values, pointers = nvrtc.parameters(arguments)
        assert len(values) == self._library.num_parameters()
        problem = self._library.emulate(
            pointers,
            (ctypes.c_uint * 3)(*grid),
            num_threads,
            shared_bytes,
            ctypes.c_ulonglong(next(self._seeds)),
        )
        assert problem is None, problem.decode()


@cache
def _compile(path: Path, name: str, defines: tuple[tuple[str, int], ...]) -> _Kernel:
    assert COMPILER is not None
    folder = _translated()
    flags = [f"-D{key}={value}" for key, value in defines]
    built = folder / ("_".join([name, *(f"{key}{value}" for key, value in defines)]) + ".so")
    unit = built.with_suffix(".cpp")
    unit.write_text(
        f'#include "device.hpp"\n#include "{path.name}"\nconst auto kernel = {name};\n{ENTRY}'
    )
    _build("-shared", f"-I{folder}", *flags, str(unit), "-o", str(built))
    return _Kernel(ctypes.CDLL(str(built)))


def _build(*arguments: str) -> None:
    # Fibers jump from stack to stack, which the C library's checks would not have.
    options = ["-std=c++17", "-Og", "-w", "-fPIC", "-U_FORTIFY_SOURCE"]
    done = subprocess.run(
        [str(COMPILER), *options, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[:4000]


@cache
def _translated() -> Path:
    """A folder with all kernels as C++, and what completes them, compiled ahead."""
    folder = Path(_FOLDER.name)
    for file in (*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")):
        (folder / file.name).write_text(_translate(file.read_text()))
    header = shutil.copy(HERE / "device.hpp", folder)
    _build("-x", "c++-header", header, "-o", f"{header}.gch")
    return folder


def _translate(source: str) -> str:
    """CUDA C++ as C++ that `device.hpp` completes."""
    source = re.sub(r"//.*", "", source)
    source = re.sub(
        r"template <class Sum, int T> struct Product;.*?(?=__device__[^\n]* void fence_registers)",
        lambda match: PRODUCT,
        source,
        flags=re.DOTALL,
    )
    source = re.sub(
        r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];",
        r"\1 *const \2 = emulated::shared_memory;",
        source,
    )
    while match := re.search(r"\basm\b(?: volatile)?\s*\(", source):
        end = _closing(source, match.end())
        call = _call(source[match.end() : end])
        source = source[: match.start()] + call + source[end + 1 :]
    return source


def _call(statement: str) -> str:
    """A statement of PTX, without its parentheses, as a call."""
    quoted = r'"(?:[^"\\]|\\.)*"'
    template = re.match(rf"\s*(?:{quoted}\s*)+", statement)
    assert template is not None, statement
    text = "".join(re.findall(quoted, template.group())).replace('"', "")
    operands, rest = [], statement[template.end() :]
    while match := re.search(r'"[^"]*"\s*\(', rest):
        end = _closing(rest, match.end())
        operands.append(rest[match.end() : end])
        rest = rest[end + 1 :]
    name = "nothing" if not text else None
    for instruction, function in INSTRUCTIONS.items():
        if name is None and instruction in text:
            name = function
    assert name is not None, f"no function for {text}"
    return f"emulated::{name}({', '.join(operands)})"


def _closing(text: str, at: int) -> int:
    """Where the parenthesis is closed in which a place is."""
    depth, quoted = 1, False
    for place in range(at, len(text)):
        char = text[place]
        if char == '"' and text[place - 1] != "\\":
            quoted = not quoted
        depth += 0 if quoted else (char == "(") - (char == ")")
        if depth == 0:
            return place
    raise AssertionError(text[at : at + 80])

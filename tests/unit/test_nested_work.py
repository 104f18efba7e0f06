"""What the kernels of nested experts are to do, decided on the device, checked on a CPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from moeruntime.kernels import face_parts

KERNELS = Path(face_parts.__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    built = tmp_path_factory.mktemp("nested_work") / "nested_work"
    source = Path(__file__).with_name("nested_work.cpp")
    header = f'-DHEADER="{KERNELS / "nested_work.cuh"}"'
    options = ["-std=c++20", "-O1", "-pthread", header]
    done = subprocess.run(
        [COMPILER, *options, str(source), "-o", str(built)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return built


def test_each_token_is_multiplied_once_and_each_row_tile_is_done(program: Path) -> None:
    done = subprocess.run([program, "1", "250"], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n"

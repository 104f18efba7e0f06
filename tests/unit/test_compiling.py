"""Every Triton kernel of an engine, compiled for a device that is not there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is made for Linux"
)

SCRIPT = Path(__file__).parent.parent / "kernels" / "compile_engine.py"

KERNELS = {
    "_add_norm_kernel",
    "_copy_kernel",
    "_decode_kernel",
    "_down_kernel",
    "_gate_up_kernel",
    "_gated_kernel",
    "_order_kernel",
    "_project_kernel",
    "_rotate_kernel",
    "_route_kernel",
    "_span_kernel",
}


@pytest.mark.parametrize(
    ("capability", "max_shared_bytes", "num_variants"), [(90, 227 * 1024, 3), (80, 163 * 1024, 1)]
)
def test_kernels_fit_a_device_and_nothing_is_compiled_once_warm(
    tmp_path: Path, capability: int, max_shared_bytes: int, num_variants: int
) -> None:
    """Triton refuses what takes more shared memory than there is, when it is to be launched."""
    arguments = [capability, max_shared_bytes, "bf16", "bfloat16", num_variants]
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        command,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout)
    assert compiled["warm"].keys() == KERNELS
    assert compiled["late"] == {}

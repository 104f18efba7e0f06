"""Compiles every Triton kernel of a step for a device that need not be there; runs none.

Arguments: compute capability, such as 90; what a program may have of shared memory, in bytes; and
"all" for float32 and nested experts, too, which takes a minute. Prints, as JSON, kernel -> the
shared bytes of each way it was compiled. Triton must not be an interpreter, so this is a process of
its own.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cuda_stand_ins
import moeruntime.engine
from moeruntime import Engine, synthetic
from moeruntime.kernels import nested_fast
from moeruntime.models import Batch
from moeruntime.models.batch import Span
from moeruntime.synthetic import SyntheticSource

BATCHES = (1, 32, 64, 128, 256)
STEPS = (("bf16", "bfloat16", BATCHES), ("3+4", "bfloat16", BATCHES), ("bf16", "float32", (1,)))
"""Code and dtype, and batches of decodes."""

compiled: dict[str, list[int]] = defaultdict(list)


class Utilities:
    """What Triton asks of a device before it launches a kernel."""

    def __init__(self, max_shared_bytes: int) -> None:
        self._max_shared_bytes = max_shared_bytes

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._max_shared_bytes, "multiprocessor_count": 1}

    def load_binary(self, name: str, image: bytes, shared: int, device: int) -> tuple[int, ...]:
        compiled[name].append(shared)
        return 0, 0, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class Device:
    """In place of Triton's driver."""

    def __init__(self, capability: int, max_shared_bytes: int) -> None:
        self.utils = Utilities(max_shared_bytes)
        self._target = GPUTarget("cuda", capability, 32)
        self.map_python_to_cpp_type = ty_to_cpp

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *arguments: None

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_step(code: str, dtype: str, batches: tuple[int, ...]) -> None:
    """Take an engine of Mixtral-8x7B's width through a prompt, and through steps by graph."""
    source = SyntheticSource("wide", code=code)
    with Engine(source, device="cpu", dtype=dtype, max_sequences=max(batches)) as engine:
        assert engine.residency.admit("v0") and engine.graphs is not None

        def span(start: int, count: int, table: list[int]) -> Span:
            return Span(engine.residency.slot("v0"), 0, [1] * count, start, table)

        engine.model.forward(Batch.build([span(0, 150, list(range(10)))], engine.device))
        for size in batches:
            engine.graphs.run([span(1, 1, [0])] * size)


def main(capability: int, max_shared_bytes: int, *, everything: bool) -> None:
    driver.set_active(Device(capability, max_shared_bytes))
    with pytest.MonkeyPatch.context() as patch:
        cuda_stand_ins.install(patch, capability=divmod(capability, 10))
        patch.setattr(moeruntime.engine, "build_model", cuda_stand_ins.build_fused)
        patch.setattr(nested_fast, "_device", lambda device: (1, capability == 90))
        config = synthetic.SYNTHETIC_MODELS["mixtral-8x7b"]
        wide = replace(config, num_layers=1, intermediate_size=192, vocab_size=512)
        patch.setitem(synthetic.SYNTHETIC_MODELS, "wide", replace(wide, max_context=1024))
        for step in STEPS if everything else STEPS[:1]:
            compile_step(*step)
    print(json.dumps(compiled))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), everything="all" in sys.argv[3:])

"""Compiles every Triton kernel of an engine for a device that need not be there; runs none.

Arguments: compute capability, such as 90; what a program may have of shared memory, in bytes; code
and dtype of the model; how many variants. Prints, as JSON, kernel -> the shared bytes of each way
it was compiled while the engine warmed up, and what was compiled afterwards, when somebody would
have waited for it. Triton must not be an interpreter, so this is a process of its own.
"""

from __future__ import annotations

import json
import random
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
from moeruntime import Engine, Request, SamplingParams, synthetic
from moeruntime.kernels import nested_fast
from moeruntime.models import step_graphs
from moeruntime.synthetic import SyntheticSource
from moeruntime.warmup import warm_up

VOCAB = 512

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


class Captured:
    """In place of a graph. Kernels are compiled when it is captured; there is nothing to replay."""

    def __init__(self, work: Callable[[], object], **_: object) -> None:
        work()

    def replay(self) -> None:
        pass

    def pool(self) -> None:
        pass


def serve(engine: Engine, num_variants: int) -> None:
    """Requests of many lengths, as they come, none of which begins like another."""
    rng = random.Random(1)
    for _ in range(60):
        length = rng.choice([1, 2, 15, 16, 17, 33, 64, 100, 130, 257, 400, 520, 700])
        params = SamplingParams(max_tokens=rng.randrange(1, 9), ignore_eos=True)
        prompt = [rng.randrange(VOCAB) for _ in range(length)]
        engine.submit(Request(f"v{rng.randrange(num_variants)}", prompt, params))
        for _ in range(rng.randrange(3)):
            engine.step()
    while not engine.scheduler.idle:
        engine.step()


def main(capability: int, max_shared_bytes: int, code: str, dtype: str, num_variants: int) -> None:
    driver.set_active(Device(capability, max_shared_bytes))
    with pytest.MonkeyPatch.context() as patch:
        cuda_stand_ins.install(patch, capability=divmod(capability, 10))
        patch.setattr(step_graphs, "capture", Captured)
        patch.setattr(moeruntime.engine, "build_model", cuda_stand_ins.build_fused)
        patch.setattr(nested_fast, "_device", lambda device: (1, capability == 90))
        # Heads of Mixtral-8x7B, and as little of the rest as is cut in the same way.
        config = synthetic._scaled(256, inner=512, layers=1, vocab=VOCAB, context=2048)
        config = replace(config, num_heads=8, num_kv_heads=2, head_dim=128)
        patch.setitem(synthetic.SYNTHETIC_MODELS, "small", config)
        source = SyntheticSource("small", num_variants=num_variants, code=code)
        with Engine(source, device="cpu", dtype=dtype, max_sequences=256) as engine:
            assert engine.graphs is not None
            engine.graphs.buffers.logits.zero_()  # which no kernel writes here
            warm_up(engine)
            warm = {name: list(ways) for name, ways in compiled.items()}
            compiled.clear()
            serve(engine, num_variants)
    print(json.dumps({"warm": warm, "late": compiled}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5]))

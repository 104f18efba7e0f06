"""How fast experts come from files to where they are computed with.

Physics: bytes are read from the page cache (the files are written or read just before) and, on
CUDA, copied from pinned memory. The two overlap, so loading should run at the slower of the two.
Both are measured in the same run: reading with as many threads into buffers that are used again and
again, copying from one run of pinned memory. On a CPU there is no copy, but the memory that weights
are read into is new, which can cost more than the reading; so that is measured instead.

Run: python benchmarks/load.py [--device cpu] [--layers 4] [--artifact PACK] [--repeats 5]
Without a pack it writes layers at the size of Mixtral-8x7B, 2.8 GB each, to a temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from _common import print_json

from moeruntime.bench.ceilings import pinned_bandwidth, read_files
from moeruntime.bench.machine import cpu_name
from moeruntime.errors import IntegrityError
from moeruntime.loader import Loader
from moeruntime.loading import load_experts, resolve_device
from moeruntime.models.experts import DecodedCache
from moeruntime.pack import Pack, WeightSource
from moeruntime.pack.manifest import EXPERT_PARTS
from moeruntime.synthetic import SyntheticSource
from moeruntime.tensorfile import DTYPES, FileTensor, TensorFile, TensorFileWriter


class WrittenSource(SyntheticSource):
    """Mixtral-8x7B whose first layers are files."""

    def __init__(self, folder: Path, num_layers: int) -> None:
        super().__init__("mixtral-8x7b")
        self.files = [self._write(folder / f"{layer}", layer) for layer in range(num_layers)]

    def _write(self, path: Path, layer: int) -> TensorFile:
        num_slots = self.manifest.num_slots[layer]
        shapes = {part: self.manifest.part_shape(part) for part in EXPERT_PARTS}
        declared = [(part, torch.int16, (num_slots, *shape)) for part, shape in shapes.items()]
        with TensorFileWriter(path, declared) as writer:
            for part, shape in shapes.items():
                row = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
                for _ in range(num_slots):
                    writer.append(part, row[None])
            writer.finish()
        return TensorFile(path, IntegrityError)

    def slot(self, layer: int, part: str, slot: int) -> tuple[FileTensor]:  # type: ignore[override]
        return (self.files[layer].row(part, slot),)


@contextmanager
def opened(artifact: Path | None, num_layers: int) -> Iterator[tuple[WeightSource, list[Path]]]:
    """A source, and the files that its experts are read from."""
    if artifact is not None:
        with Pack(artifact) as pack:
            experts = ("experts/", "private/")
            paths = [pack.path(file) for file in pack.manifest.files if file.startswith(experts)]
            yield pack, paths
        return
    with tempfile.TemporaryDirectory() as folder:
        source = WrittenSource(Path(folder), num_layers)
        yield source, [file.path for file in source.files]


def median_gb_per_s(run: Callable[[], int], repeats: int) -> float:
    rates = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        num_bytes = run()
        rates.append(num_bytes / (time.perf_counter() - start_s) / 1e9)
    return statistics.median(rates)


def load_all(source: WeightSource, num_layers: int, device: torch.device) -> int:
    """Load layers as an engine does; returns how many."""
    dtype = DTYPES[source.manifest.expert_dtype]
    pools = []
    with Loader(device) as loader:
        for layer in range(num_layers):
            pools.append(load_experts(source, layer, dtype, loader, DecodedCache(0)))
    return len(pools)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure loading against reading and copying.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--layers", type=int, default=None, help="default: 4 on CUDA, 1 on CPU")
    parser.add_argument("--artifact", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    num_layers = arguments.layers or (4 if device.type == "cuda" else 1)
    with opened(arguments.artifact, num_layers) as (source, paths):
        if arguments.artifact is not None:
            num_layers = source.manifest.config.num_layers
        num_bytes = read_files(paths)  # into the page cache, where it was not there yet
        read = median_gb_per_s(lambda: read_files(paths), arguments.repeats)
        load_all(source, 1, device)  # what the first use of a device costs is not loading

        def load() -> int:
            load_all(source, num_layers, device)
            return num_bytes

        load_rate = median_gb_per_s(load, arguments.repeats)
        rates = {"read_gb_per_s": read}
        if device.type == "cuda":
            rates["pinned_copy_gb_per_s"] = pinned_bandwidth(device) / 1e9
        else:
            rates["read_to_new_memory_gb_per_s"] = median_gb_per_s(
                lambda: read_files(paths, fresh=True), arguments.repeats
            )
    floor = min(rates.values())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    print(f"{num_bytes / 1e9:.1f} GB of experts to {device} ({name})")
    for what, rate in rates.items():
        print(f"  {what:28s} {rate:6.1f}")
    print(f"  {'load_gb_per_s':28s} {load_rate:6.1f}  {load_rate / floor:.0%} of the slower")
    print_json(
        {
            "benchmark": "load",
            "device": name,
            "gb": num_bytes / 1e9,
            **rates,
            "load_gb_per_s": load_rate,
            "of_slower": load_rate / floor,
        }
    )


if __name__ == "__main__":
    main()

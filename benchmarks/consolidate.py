"""How long consolidation takes, against reading its input and writing its output, and mergekit.

Physics: every input byte has to be read and every output byte written. What that takes is measured
by a plain loop that reads the same files into one buffer and writes as many bytes as the pack has,
through the page cache, flushed to the disk. What comes on top is arithmetic: digests of all that
is read and written, similarities, means or codes; what moec saves is the copy into the page cache.
All times are of whole processes, one after another, with the input in the page cache; only ratios
within one run mean much on a shared machine.

mergekit merges all of it into one model, with the same input and about the same output as
`--merge average`. It needs an environment of its own, whose Python is given.

Run: python benchmarks/consolidate.py --work DIR [--mergekit PYTHON] [--ways average]
Needs about 2 GB of disk a variant, and as much again for output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import make_checkpoint, print_json

from moeruntime.bench.machine import cpu_name

HIDDEN, INNER, LAYERS = 1024, 3584, 9
SMALL_HIDDEN, SMALL_INNER = 256, 896
RAW = """
import os, sys
out, num_bytes, *files = sys.argv[1:]
buffer = bytearray(16 << 20)
for file in files:
    fd = os.open(file, os.O_RDONLY)
    while os.readv(fd, [buffer]):
        pass
    os.close(fd)
left = int(num_bytes)
fd = os.open(out, os.O_WRONLY | os.O_CREAT)
while left > 0:
    left -= os.write(fd, memoryview(buffer)[:left])
os.fsync(fd)
"""
MOEC = "from moeconsolidate.cli import main; main()"


@dataclass(frozen=True)
class Run:
    """One process: how long it took, on how much of a core, and the most memory it had."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    num_bytes: int = 0


def measure(*command: object, out: Path) -> Run:
    """Run a process that makes `out`, which is removed; raises if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command}: {said.decode()[-2000:]}")
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    num_bytes = sum(path.stat().st_size for path in files)
    if out.is_file():
        out.unlink()
    else:
        shutil.rmtree(out)
    os.sync()  # what one run left to be written is not for the next to wait for
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, num_bytes)


def mergekit_config(models: Sequence[Path], path: Path) -> Path:
    """The linear merge of all models, equally weighted."""
    document = {
        "merge_method": "linear",
        "dtype": "bfloat16",
        "models": [{"model": str(one), "parameters": {"weight": 1.0}} for one in models],
    }
    path.write_text(json.dumps(document))  # which is YAML, too
    return path


def compare(
    models: Sequence[Path],
    work: Path,
    repeats: int,
    chosen: Sequence[str],
    mergekit: Path | None,
) -> dict[str, object]:
    """Time the chosen ways of doing it, `repeats` times in turn; the fastest of each counts."""
    files = [path for one in models for path in sorted(one.glob("*.safetensors"))]
    input_bytes = sum(path.stat().st_size for path in files)
    moec = (sys.executable, "-c", MOEC, "consolidate", *models, "--quiet", "--out", work / "out")
    ways: dict[str, tuple[object, ...]] = {
        "average": (*moec, "--merge", "average"),
        "nested": moec,
    }
    if mergekit is not None:
        config = mergekit_config(models, work / "mergekit.yml")
        run = "from mergekit.scripts.run_yaml import main; main()"
        ways["mergekit"] = (mergekit, "-c", run, config, work / "out", "--lazy-unpickle")
    ways = {name: command for name, command in ways.items() if name in (*chosen, "mergekit")}
    best: dict[str, Run] = {}
    for _ in range(repeats):
        for name, command in ways.items():
            raw_files = [str(path) for path in files]
            run_of = measure(*command, out=work / "out")
            raw = measure(
                sys.executable,
                "-c",
                RAW,
                work / "raw",
                run_of.num_bytes,
                *raw_files,
                out=work / "raw",
            )
            for key, one in ((name, run_of), (f"raw of {name}", raw)):
                if key not in best or one.wall_s < best[key].wall_s:
                    best[key] = one
    rows: dict[str, object] = {"variants": len(models), "input_bytes": input_bytes}
    print(f"{len(models)} variants, {input_bytes / 1e9:.2f} GB in")
    for name in ways:
        one, raw = best[name], best[f"raw of {name}"]
        ratio = one.wall_s / raw.wall_s
        print(
            f"  {name:9s} {one.wall_s:6.2f} s ({one.cpu_s:.2f} of a core), "
            f"raw {raw.wall_s:5.2f} s, ratio {ratio:5.2f}, "
            f"{one.num_bytes / 1e9:5.2f} GB out, peak {one.peak_bytes / 1e6:.0f} MB"
        )
        rows[name] = {
            "wall_s": one.wall_s,
            "cpu_s": one.cpu_s,
            "raw_s": raw.wall_s,
            "ratio": ratio,
            "output_bytes": one.num_bytes,
            "peak_bytes": one.peak_bytes,
        }
    return rows


def predicted_bytes(*options: object) -> int:
    """Peak memory as `moec plan --dry-run` predicts it."""
    call = [sys.executable, "-c", MOEC, "plan", *map(str, options), "--dry-run", "--json"]
    done = subprocess.run(call, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout)["memory_bytes"])


def depth_memory(depths: Sequence[int], work: Path) -> list[dict[str, object]]:
    """Peak memory of consolidating two variants, predicted and measured, by number of layers."""
    rows: list[dict[str, object]] = []
    layer_bytes = 2 * 8 * 3 * SMALL_HIDDEN * SMALL_INNER * 2
    for depth in depths:
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            models = make_models(2, depth, SMALL_HIDDEN, SMALL_INNER, Path(scratch))
            out = Path(scratch) / "out"
            moec = (sys.executable, "-c", MOEC, "consolidate", *models, "--quiet", "--out", out)
            for name, options in {"average": ("--merge", "average"), "nested": ()}.items():
                peak = measure(*moec, *options, out=out).peak_bytes
                predicted = predicted_bytes(*models, *options)
                print(
                    f"{depth:3d} layers, {name}: peak {peak / 1e6:.0f} MB, predicted "
                    f"{predicted / 1e6:.0f} MB; a layer of both is {layer_bytes / 1e6:.0f} MB",
                    flush=True,
                )
                rows.append(
                    {
                        "layers": depth,
                        "way": name,
                        "layer_bytes": layer_bytes,
                        "peak_bytes": peak,
                        "predicted_bytes": predicted,
                    }
                )
    return rows


def make_models(number: int, layers: int, hidden: int, inner: int, parent: Path) -> list[Path]:
    """Random fine-tunes of one base."""
    models = [parent / f"model-{idx}" for idx in range(number)]
    for idx, folder in enumerate(models):
        make_checkpoint(
            folder, seed=idx + 1, num_layers=layers, hidden_size=hidden, intermediate_size=inner
        )
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk to measure")
    parser.add_argument("--variants", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--ways", nargs="+", default=["average", "nested"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depths", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--mergekit", type=Path, help="a Python that has mergekit")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work, prefix="moec-bench-") as scratch:
        work = Path(scratch)
        models = make_models(max(args.variants), args.layers, HIDDEN, INNER, work)
        os.sync()
        rows = [
            compare(models[:number], work, args.repeats, args.ways, args.mergekit)
            for number in args.variants
        ]
        for folder in models:
            shutil.rmtree(folder)
        depths = depth_memory(args.depths, work)
    print_json(
        {
            "benchmark": "consolidate",
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "rows": rows,
            "depths": depths,
        }
    )


if __name__ == "__main__":
    main()

"""Peak memory of `moec consolidate`: one layer of all variants plus a constant, flat in depth.

Physics: the compiler holds one layer's experts of every variant in one reused buffer, and streams
everything else, so peak memory above the interpreter's own must not grow with the layers.

Run: python benchmarks/memory.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import make_checkpoint, print_json

from moeruntime.bench.machine import cpu_name

HIDDEN, INNER, EXPERTS = 512, 1792, 8
DEPTHS = (4, 8, 16)

CHILD = """
import json, resource, sys
from moeconsolidate.pipeline import consolidate
import scipy.cluster.hierarchy
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
consolidate(sys.argv[2:], sys.argv[1], threshold=0.9, code="plain")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([before * 1024, after * 1024]))
"""


def main() -> None:
    layer_bytes = 2 * EXPERTS * 3 * HIDDEN * INNER * 2
    print(f"one layer of two variants: {layer_bytes / 1e6:.0f} MB")
    rows = []
    for num_layers in DEPTHS:
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            models = []
            for seed in (1, 2):
                folder = root / f"model-{seed}"
                num_bytes = make_checkpoint(
                    folder,
                    seed=seed,
                    num_layers=num_layers,
                    hidden_size=HIDDEN,
                    intermediate_size=INNER,
                    num_experts=EXPERTS,
                )
                models.append(str(folder))
            output = subprocess.run(
                [sys.executable, "-c", CHILD, str(root / "pack"), *models],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            before, after = json.loads(output)
        over = (after - before) / layer_bytes
        rows.append({"layers": num_layers, "model_bytes": num_bytes, "peak_bytes": after - before})
        print(
            f"{num_layers:3d} layers, {2 * num_bytes / 1e6:6.0f} MB read: peak "
            f"{(after - before) / 1e6:5.0f} MB above the start, {over:.2f} layers"
        )
    print_json({"benchmark": "memory", "cpu": cpu_name(), "layer_bytes": layer_bytes, "rows": rows})


if __name__ == "__main__":
    main()

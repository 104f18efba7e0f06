"""Peak memory of `moec consolidate`: a few layers of all variants plus a constant, flat in depth.

Physics: the compiler holds one layer's experts of every variant in one reused buffer, and streams
everything else, so peak memory above the interpreter's own must not grow with the layers. Under a
budget it also holds what calibration learned of that layer; the rest waits on disk.

Run: python benchmarks/memory.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from _common import make_checkpoint, print_json

from moeruntime.bench.machine import cpu_name

EXPERTS = 8
TEXT = "Say what each line does, then say it again in fewer words. " * 100

CHILD = """
import json, resource, sys
from pathlib import Path
from moeconsolidate.pipeline import consolidate
import scipy.cluster.hierarchy
out, text, *models = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if text:
    texts = {Path(model).name: [Path(text)] for model in models}
    consolidate(models, out, budget="0.3x", code="nested", calibration=texts)
else:
    consolidate(models, out, threshold=0.9, code="plain")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([before * 1024, after * 1024]))
"""


@dataclass(frozen=True)
class Case:
    """What is compiled: sizes of a model, whether under a budget, and how many layers."""

    name: str
    hidden: int
    inner: int
    budget: bool
    depths: tuple[int, ...]

    @property
    def layer_bytes(self) -> int:
        """Of two variants' experts."""
        return 2 * EXPERTS * 3 * self.hidden * self.inner * 2

    @property
    def learned_bytes(self) -> int:
        """Of two variants' second moments of one layer."""
        if not self.budget:
            return 0
        return 2 * EXPERTS * (self.hidden**2 + self.inner**2) * 4


CASES = (
    Case("plain", 512, 1792, budget=False, depths=(4, 8, 16)),
    Case("budget", 256, 512, budget=True, depths=(4, 8, 12)),
)


def run(case: Case, num_layers: int) -> dict[str, object]:
    """Compile two random variants in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        root, models = Path(temporary), []
        text = root / "text.jsonl"
        text.write_text(json.dumps({"text": TEXT}) + "\n")
        for seed in (1, 2):
            folder = root / f"model-{seed}"
            num_bytes = make_checkpoint(
                folder,
                seed=seed,
                num_layers=num_layers,
                hidden_size=case.hidden,
                intermediate_size=case.inner,
                num_experts=EXPERTS,
            )
            models.append(str(folder))
        texts = str(text) if case.budget else ""
        output = subprocess.run(
            [sys.executable, "-c", CHILD, str(root / "pack"), texts, *models],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    before, after = json.loads(output)
    print(
        f"{case.name:6s} {num_layers:3d} layers, {2 * num_bytes / 1e6:6.0f} MB read, "
        f"{num_layers * case.learned_bytes / 1e6:6.0f} MB learned: peak "
        f"{(after - before) / 1e6:5.0f} MB above the start",
        flush=True,
    )
    return {
        "case": case.name,
        "layers": num_layers,
        "model_bytes": num_bytes,
        "layer_bytes": case.layer_bytes,
        "learned_bytes": case.learned_bytes,
        "peak_bytes": after - before,
    }


def main() -> None:
    rows = []
    for case in CASES:
        print(
            f"{case.name}: a layer of two variants is {case.layer_bytes / 1e6:.0f} MB, and what "
            f"calibration learns of it {case.learned_bytes / 1e6:.0f} MB"
        )
        rows += [run(case, num_layers) for num_layers in case.depths]
    print_json({"benchmark": "memory", "cpu": cpu_name(), "rows": rows})


if __name__ == "__main__":
    main()

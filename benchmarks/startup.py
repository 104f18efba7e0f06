"""How long `moec --help` and `import moeruntime` take, against starting Python itself.

Physics: the commands import what they need when they run. torch alone takes a second or more, so a
`--help` that loaded it would show at once.

Run: python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from _common import print_json

from moeruntime.bench.machine import cpu_name

REPEATS = 15
CASES = {
    "python -c pass": "pass",
    "import moeruntime": "import moeruntime",
    "moec --help": "from moeconsolidate.cli import main; main(['--help'])",
    "import torch": "import torch",
}


def main() -> None:
    rows = {}
    for name, code in CASES.items():
        times_s = []
        for _ in range(REPEATS):
            start_s = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            times_s.append(time.perf_counter() - start_s)
        rows[name] = statistics.median(times_s)
        print(f"{name:20s} {rows[name] * 1e3:6.0f} ms (median of {REPEATS})")
    print_json({"benchmark": "startup", "cpu": cpu_name(), "median_s": rows})


if __name__ == "__main__":
    main()

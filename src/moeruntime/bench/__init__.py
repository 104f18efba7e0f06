"""Measures an engine on the machine at hand, each figure beside the best the machine could do.

`ceilings` finds out what that is: how fast memory is read, how fast products are, how fast pinned
memory is copied. `decode`, `prompts` and `memory` measure; `suite` composes them into a `Report`,
which is what `moec bench` prints. The scripts in benchmarks/ use the same pieces.
"""

from moeruntime.bench.report import Report
from moeruntime.bench.suite import BenchOptions, run_bench

__all__ = ["BenchOptions", "Report", "run_bench"]

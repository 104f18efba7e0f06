"""Loss against bytes for 2, 4 and 8 variants: how little memory serves how many models.

For each number of variants and each budget, bits are chosen by calibration text (or, without any,
by text that the variants write), with 4 shared bits, or with 3 or 2 where the budget has no room
for more. `moec report --curve` draws the result: save the last line as a file.

Run: python benchmarks/curve.py --checkpoints DIR --prefix tiny- --more DIR --data DIR \
         --calibration DIR
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from _common import print_json
from _methods import Methods
from _subjects import Scorer, add_arguments, subjects_of
from compare import Row, measure

from moeruntime.bench.machine import cpu_name
from moeruntime.errors import UsageError

ORDER = ("base", "math", "python", "shell", "prose", "tldr", "langid", "codesum")
SHARED = ("budget-text", "budget-text-3", "budget-text-2")


def best(
    scorer: Scorer, methods: Methods, names: list[str], budget: float, ways: tuple[str, ...]
) -> Row | None:
    """The first way that the budget has room for."""
    for way in ways:
        try:
            return measure(scorer, methods, names, way, budget)
        except UsageError:
            continue
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[0.07, 0.10, 0.13, 0.16, 0.20, 0.25, 0.32, 0.50],
    )
    arguments = parser.parse_args()
    every = {one.name: one for one in subjects_of(arguments)}
    ordered = [every[name] for name in ORDER if name in every]
    ways = SHARED if arguments.calibration else ("budget-self",)
    rows = []
    print("variants  budget   bytes    worst     mean    KL worst  top-1  method               s")
    for count in arguments.counts:
        if count > len(ordered):
            print(f"{count:8d}  there are only {len(ordered)}; more with --more")
            continue
        subjects = ordered[:count]
        names = [one.name for one in subjects]
        scorer = Scorer(subjects, context=arguments.context, num_windows=arguments.windows)
        methods = Methods(subjects)
        for budget in arguments.budgets:
            row = best(scorer, methods, names, budget, ways)
            if row is None:
                print(f"{count:8d}  {budget:5.2f}x  out of reach", flush=True)
                continue
            print(
                f"{count:8d}  {budget:5.2f}x  {row.expert_ratio:.3f}  {row.worst:+.4f}  "
                f"{row.mean:+.4f}  {row.worst_kl:10.5f}  {row.worst_top1:5.1%}  "
                f"{row.method:14s}  {row.seconds:6.1f}",
                flush=True,
            )
            rows.append(asdict(row) | {"method": f"{count} variants", "way": row.method})
    print_json({"benchmark": "curve", "cpu": cpu_name(), "rows": rows})


if __name__ == "__main__":
    main()

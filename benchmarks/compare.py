"""Ways of sharing experts, side by side: what each costs every variant, for how many bytes.

Methods:
  merge rules        one expert for all variants at every index, no private bits
  published-half     half of all experts shared as published, the closest ones; the others private
  published-0.50x    the same, so many shared that half of the bytes remain
  private-int4       every variant alone: 4 bits in groups of 32, the best of many scales a group
  control-2, -3, -4  nested codes of 2, 3 or 4 common bits and the allocator, but nothing shared:
                     what sharing is worth
  nested-4+2, -4+3   shared 4 bits, private 2 or 3; no data
  budget-self        bits chosen under a budget, by text that the variants write themselves
  budget-text        the same, by calibration text; budget-text-3 and -2 share 3 and 2 bits

Every variant is scored on its own text (base: the mean over English and tldr), as `_subjects` says;
with --cross on the others' texts too. Bytes are those of expert weights, scales, private codes,
maps and tables of codes, against separate 16-bit models. Without calibration text, what needs some
takes text that the variants write. Calibration is done once for each kind of text; its seconds are
counted in every row that needs it.

Run: python benchmarks/compare.py
     python benchmarks/compare.py --checkpoints DIR --prefix tiny- --data DIR --calibration DIR
     ... --more DIR    with the variants that finetune.py made
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from _common import print_json
from _methods import BUDGETED, METHODS, Methods
from _subjects import Score, Scorer, add_arguments, subjects_of

from moeruntime.bench.machine import cpu_name
from moeruntime.errors import UsageError

NEED_TEXT = ("budget-text", "budget-text-3", "budget-text-2")
DEFAULT_METHODS = tuple(one for one in METHODS if one not in ("budget-text-3", "budget-text-2"))


@dataclass(frozen=True)
class Row:
    """Losses are increases in nats per token; `worst_outside` is on texts of other variants."""

    method: str
    budget: float | None
    expert_ratio: float
    seconds: float
    worst: float
    mean: float
    worst_outside: float | None
    worst_kl: float
    mean_kl: float
    worst_top1: float
    variants: Mapping[str, Score]


def measure(
    scorer: Scorer, methods: Methods, names: Sequence[str], method: str, budget: float | None
) -> Row:
    """Make it, score every variant, forget it.

    Raises:
        UsageError: the budget is below what shared bits alone take.
    """
    scores = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        methods.made(method, budget, Path(folder) / "pack") as (ratio, seconds, open_engine),
    ):
        for name in names:
            with open_engine(name) as engine:
                scores[name] = scorer.score(name, engine)
    increases = [one.increase for one in scores.values()]
    outside = [value for one in scores.values() for value in one.outside.values()]
    kls = [one.kl for one in scores.values()]
    return Row(
        method=method,
        budget=budget,
        expert_ratio=ratio,
        seconds=seconds,
        worst=max(increases),
        mean=sum(increases) / len(increases),
        worst_outside=max(outside) if outside else None,
        worst_kl=max(kls),
        mean_kl=sum(kls) / len(kls),
        worst_top1=min(one.top1 for one in scores.values()),
        variants=scores,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--cross", action="store_true", help="score on others' texts too")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.07, 0.10, 0.13, 0.16, 0.20, 0.25, 0.32]
    )
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS), choices=METHODS)
    arguments = parser.parse_args()
    subjects = subjects_of(arguments)
    names = [one.name for one in subjects]
    scorer = Scorer(
        subjects,
        context=arguments.context,
        num_windows=arguments.windows,
        cross=arguments.cross,
    )
    methods = Methods(subjects)
    heads = "".join(f"{name:>9s}" for name in names)
    print(
        "method              budget   bytes    worst     mean  outside    KL worst  top-1"
        f"{heads}       s"
    )
    rows, unreachable = [], []
    for method in arguments.methods:
        if method in NEED_TEXT and arguments.calibration is None:
            continue
        for budget in arguments.budgets if method in BUDGETED else [None]:
            wanted = "" if budget is None else f"{budget:g}x"
            try:
                row = measure(scorer, methods, names, method, budget)
            except UsageError as problem:  # a budget below what shared bits alone take
                print(f"{method:18s}  {wanted:>6s}  {problem}", flush=True)
                unreachable.append({"method": method, "budget": budget, "why": str(problem)})
                continue
            each = "".join(f"{one.increase:+9.4f}" for one in row.variants.values())
            outside = "" if row.worst_outside is None else f"{row.worst_outside:+.4f}"
            print(
                f"{method:18s}  {wanted:>6s}  {row.expert_ratio:.3f}  {row.worst:+.4f}  "
                f"{row.mean:+.4f}  {outside:>7s}  {row.worst_kl:10.5f}  {row.worst_top1:5.1%}"
                f"{each}  {row.seconds:6.1f}",
                flush=True,
            )
            rows.append(asdict(row))
    print_json(
        {
            "benchmark": "compare",
            "cpu": cpu_name(),
            "variants": names,
            "prefix": arguments.prefix,
            "windows": arguments.windows,
            "context": arguments.context,
            "calibration": "text" if arguments.calibration else "self",
            "originals": {name: score.nll for name, score in scorer.originals.items()},
            "rows": rows,
            "unreachable": unreachable,
        }
    )


if __name__ == "__main__":
    main()

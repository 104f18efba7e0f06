"""What people see: progress on stderr, tables on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from moeconsolidate.plan import OnProgress, Progress
from moeconsolidate.report import PackSummary, format_bytes, sharing_lines

if TYPE_CHECKING:
    from moeconsolidate.dry_run import Estimate
    from moeconsolidate.evaluation import EvaluationRow
    from moeconsolidate.plan import ConsolidationPlan

__all__ = ["print_estimate", "print_scores", "print_sharing", "print_summary", "progress"]

MIN_WIDTH = 100
"""Columns assumed where the output is not a terminal that knows better."""


@contextmanager
def progress(*, quiet: bool = False, as_json: bool = False) -> Iterator[OnProgress]:
    """Yield what to call after each step.

    It draws a bar on a terminal, and prints about ten lines a stage anywhere else: as JSON, where
    a program reads them.
    """
    if quiet:
        yield lambda step: None
    elif as_json:
        yield _tenths(lambda step: json.dumps({"event": "progress", **asdict(step)}))
    elif sys.stderr.isatty():
        with _bars() as on_progress:
            yield on_progress
    else:
        yield _tenths(lambda step: f"{step.stage}: {_counts(step)}")


def print_summary(summary: PackSummary) -> None:
    """Print what a pack saves against separate models, part by part."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"{len(summary.variants)} {summary.family} variants",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("part")
    table.add_column("in the pack", justify="right")
    table.add_column("as separate models", justify="right")
    table.add_column("ratio", justify="right")
    num_slots = sum(layer.num_slots for layer in summary.layers)
    num_experts = sum(layer.num_experts for layer in summary.layers)
    table.add_row(
        f"experts: {num_slots} slots for {num_experts}",
        format_bytes(summary.expert_bytes),
        format_bytes(summary.separate_expert_bytes),
        f"{summary.expert_ratio:.1%}",
    )
    table.add_row("other weights in common", format_bytes(summary.common_bytes), "", "")
    for variant in summary.variants:
        table.add_row(f"other weights of {variant.name}", format_bytes(variant.own_bytes), "", "")
    table.add_section()
    table.add_row(
        "all tensors",
        format_bytes(summary.pack_bytes),
        format_bytes(summary.separate_bytes),
        f"{summary.pack_ratio:.1%}",
    )
    _print(table)


def print_sharing(summary: PackSummary) -> None:
    """Print, layer by layer, how many slots there are and who shares them."""
    from rich import box
    from rich.table import Table

    table = Table(
        title="slots: expert numbers, by who shares them", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("layer", justify="right")
    table.add_column("slots", justify="right")
    table.add_column("experts", justify="right")
    table.add_column("shared")
    for layer in summary.layers:
        table.add_row(
            str(layer.layer),
            str(layer.num_slots),
            str(layer.num_experts),
            "\n".join(sharing_lines(layer)) or "none",
        )
    _print(table)


def print_plan(plan: ConsolidationPlan) -> None:
    """Print each layer's slots and private bits, and what that is expected to cost."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("layer", "slots", "experts", "private bits of gate_up", "of down"):
        table.add_column(column, justify="right")
    for layer in plan.layers:
        bits: tuple[list[int], list[int]] = ([], [])
        for codes in (codes for members in layer.codes for codes in members):
            for idx, code in enumerate(codes):
                bits[idx].append(code.bits)
        means = [f"{sum(one) / len(one):.2f}" if one else "" for one in bits]
        num_experts = sum(len(members) for members in layer.slots)
        table.add_row(str(layer.layer), str(len(layer.slots)), str(num_experts), *means)
    _print(table)
    if plan.prediction is not None:
        print(f"experts: {format_bytes(plan.prediction.expert_bytes)}")
        for name, loss in plan.prediction.losses.items():
            print(f"predicted loss of {name}: {loss:+.4f} nats per token")


def print_estimate(estimate: Estimate) -> None:
    """Print what a consolidation would take, a line each."""
    for name, num_bytes in estimate.download_bytes.items():
        print(f"to download for {name}: {format_bytes(num_bytes)}")
    least, most = map(format_bytes, estimate.pack_bytes)
    print(f"to read: {format_bytes(estimate.input_bytes)}")
    print(f"disk for the pack: {least} where all is shared, {most} where nothing is")
    if estimate.memory_bytes is None or estimate.arithmetic_s is None:
        print("memory and time: not predicted where there is calibration")
        return
    print(f"peak memory: {format_bytes(estimate.memory_bytes)}")
    print(f"arithmetic on this machine, beside reading and writing: {estimate.arithmetic_s:.0f} s")


def print_scores(rows: Sequence[EvaluationRow]) -> None:
    """Print each variant's loss on each text, and what it is more than its original's."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("variant")
    table.add_column("text")
    for column in ("tokens", "NLL", "perplexity", "original NLL", "increase"):
        table.add_column(column, justify="right")
    for row in rows:
        compared = ("", "")
        if row.reference is not None:
            compared = (f"{row.reference.nll:.4f}", f"{row.increase:+.4f}")
        table.add_row(
            row.variant,
            row.data,
            str(row.score.num_tokens),
            f"{row.score.nll:.4f}",
            f"{row.score.perplexity:.3f}",
            *compared,
        )
    _print(table)


def _print(table: object) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, MIN_WIDTH)
    console.print(table)


def _tenths(line: Callable[[Progress], str]) -> OnProgress:
    """Print a line whenever another tenth of a stage is done."""
    printed: dict[str, int] = {}

    def on_progress(step: Progress) -> None:
        tenth = step.done * 10 // max(1, step.total)
        if tenth > printed.get(step.stage, 0):
            printed[step.stage] = tenth
            print(line(step), file=sys.stderr, flush=True)

    return on_progress


def _counts(step: Progress) -> str:
    if step.unit == "bytes":
        return f"{format_bytes(step.done)} of {format_bytes(step.total)}"
    return f"{step.done} of {step.total}"


@contextmanager
def _bars() -> Iterator[OnProgress]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, object] = {}

        def on_progress(step: Progress) -> None:
            counts = _counts(step)
            if step.stage not in tasks:
                tasks[step.stage] = bars.add_task(step.stage, total=step.total, counts=counts)
            bars.update(tasks[step.stage], completed=step.done, counts=counts)  # type: ignore[arg-type]

        yield on_progress

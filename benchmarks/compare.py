"""Ways of sharing experts, side by side: what each costs every variant, for how many bytes.

Methods:
  merge rules        one expert for all variants at every index, no private bits
  private-int4       every variant alone: 4 bits in groups of 32, the best of many scales a group
  control            nested codes and the allocator, but nothing shared: what sharing is worth
  nested-4+2, -4+3   shared 4 bits, private 2 or 3; no data
  budget-self        bits chosen under a budget, by text that the variants write themselves
  budget-text        the same, by calibration text

Every variant is scored on its own text (base: the mean over English and tldr): the increase of its
negative log-likelihood over its original's, nats per token; and, since merging can lower a loss and
still change what a model says, its fidelity to the original: the mean KL divergence of its
predictions from the original's, and how often both predict the same token first. Bytes are those of
expert weights, scales, private codes, maps and tables of codes, against separate 16-bit models.
Rules that need calibration take the calibration text, or else text that the variants write.
Calibration is done once for each kind of text; its seconds are counted in every row that needs it.

Run: python benchmarks/compare.py
     python benchmarks/compare.py --checkpoints DIR --prefix tiny- --data DIR --calibration DIR
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from _common import EXAMPLES, cpu_name, print_json
from torch import Tensor

from moeconsolidate import pipeline
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.merging import MERGE_RULES
from moeconsolidate.original import CheckpointSource
from moeconsolidate.plan import CALIBRATED_MERGES, ConsolidationPlan, LayerPlan, Recipe
from moeconsolidate.planning import Calibration
from moeconsolidate.report import summarise
from moeconsolidate.texts import read_texts
from moeruntime import Engine
from moeruntime.codes import PrivateCode
from moeruntime.errors import UsageError
from moeruntime.families import ModelConfig
from moeruntime.pack import MadeTensor, Pack

TEXTS = {"base": ("english", "tldr"), "python": ("python",), "math": ("math",), "shell": ("shell",)}
BUDGETED = ("control", "budget-self", "budget-text")
METHODS = (*MERGE_RULES, "private-int4", "nested-4+2", "nested-4+3", *BUDGETED)

INT4_GROUP = 32
INT4_FACTORS = tuple(0.5 + 0.025 * step for step in range(25))


@dataclass(frozen=True)
class Score:
    """One variant on its own text; without a reference the last three compare with nothing."""

    nll: float
    increase: float = 0.0
    kl: float = 0.0
    top1: float = 1.0


@dataclass(frozen=True)
class Row:
    method: str
    budget: float | None
    expert_ratio: float
    seconds: float
    worst: float
    mean: float
    worst_kl: float
    mean_kl: float
    worst_top1: float
    variants: Mapping[str, Score]


Open = Callable[[str], Engine]


class Texts:
    """Each variant's windows, and what its original predicts for them."""

    def __init__(
        self, folders: Mapping[str, Path], data: Path, *, context: int, num_windows: int
    ) -> None:
        self._windows: dict[str, list[list[list[int]]]] = {}
        self._originals: dict[str, list[list[tuple[Tensor, Tensor]]]] = {}
        self.originals: dict[str, Score] = {}
        for name, folder in folders.items():
            with Engine(CheckpointSource(Checkpoint(name, folder))) as engine:
                encode = engine.text(name).encode_document
                self._windows[name] = []
                for text in TEXTS[name]:
                    documents = read_texts(data / f"{text}.jsonl")
                    stream = [token for document in documents for token in encode(document)]
                    usable = min(len(stream) // context, num_windows) * context
                    self._windows[name].append(
                        [stream[at : at + context] for at in range(0, usable, context)]
                    )
                # Half precision for memory's sake; its errors are far below what is measured.
                nll, self._originals[name] = 0.0, []
                for windows in self._windows[name]:
                    kept, losses = [], []
                    for ids, logprobs_TV in zip(
                        windows, engine.logprobs(name, windows), strict=True
                    ):
                        losses.append(_nll(ids, logprobs_TV))
                        kept.append((logprobs_TV[:-1].half(), logprobs_TV[:-1].argmax(-1)))
                    self._originals[name].append(kept)
                    nll += sum(losses) / len(losses) / len(TEXTS[name])
                self.originals[name] = Score(nll)

    def score(self, name: str, engine: Engine) -> Score:
        """One variant on its own texts, each text counting alike."""
        totals = torch.zeros(3, dtype=torch.float64)
        for windows, originals in zip(self._windows[name], self._originals[name], strict=True):
            sums = torch.zeros(3, dtype=torch.float64)
            for ids, (original, first_T), logprobs_TV in zip(
                windows, originals, engine.logprobs(name, windows), strict=True
            ):
                original_TV = original.float().log_softmax(dim=-1)
                ours_TV = logprobs_TV[:-1]
                kl_T = F.kl_div(ours_TV, original_TV, reduction="none", log_target=True).sum(-1)
                same_T = ours_TV.argmax(-1) == first_T
                sums += torch.tensor(
                    [_nll(ids, logprobs_TV), float(kl_T.mean()), float(same_T.float().mean())]
                )
            totals += sums / len(windows) / len(TEXTS[name])
        nll, kl, top1 = totals.tolist()
        return Score(nll, nll - self.originals[name].nll, kl, top1)


def _nll(ids: Sequence[int], logprobs_TV: Tensor) -> float:
    """Mean over a window's predicted tokens."""
    return -float(logprobs_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None]).double().mean())


class Int4Source(CheckpointSource):
    """One checkpoint whose experts have been through 4 bits."""

    def slot(self, layer: int, part: str, slot: int) -> tuple[MadeTensor]:
        stored = super().slot(layer, part, slot)

        def fill(out: Tensor) -> None:
            out.copy_(through_int4(torch.cat([piece.read() for piece in stored]).float()))

        return (MadeTensor(stored[0].dtype, self.manifest.part_shape(part), fill),)


def through_int4(weights_RC: Tensor) -> Tensor:
    """Round to 16 levels -8..7 times a bfloat16 scale a group; all weights matter alike.

    Of scales of both signs (the longer side may be either) the one with least squared error.
    """
    num_rows, num_columns = weights_RC.shape
    padded = F.pad(weights_RC, (0, -num_columns % INT4_GROUP)).view(num_rows, -1, INT4_GROUP)
    largest = padded.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
    best = torch.zeros_like(padded)
    least = torch.full_like(largest, torch.inf)
    for factor in (sign * factor for sign in (1, -1) for factor in INT4_FACTORS):
        scale = (largest * (factor / 7.5)).bfloat16().float()
        rounded = (padded / scale).round().clamp(-8, 7) * scale
        error = (rounded - padded).square().sum(dim=-1, keepdim=True)
        best = torch.where(error < least, rounded, best)
        least = torch.minimum(error, least)
    return best.flatten(1)[:, :num_columns]


def int4_ratio(config: ModelConfig) -> float:
    """Bytes of 4-bit codes and scales against 16-bit weights."""
    hidden, inner = config.hidden_size, config.intermediate_size
    bits = 0
    for num_rows, num_columns in ((2 * inner, hidden), (hidden, inner)):
        bits += num_rows * (4 * num_columns + 16 * -(-num_columns // INT4_GROUP))
    return bits / (16 * config.expert_numel)


class Methods:
    """Makes a pack, or engines, of each method."""

    def __init__(self, folders: Mapping[str, Path], calibration: Path | None) -> None:
        self._folders = folders
        self._texts: dict[str, list[Path]] | None = None
        if calibration is not None:
            self._texts = {
                name: [calibration / f"{text}.jsonl" for text in TEXTS[name]] for name in folders
            }
        with Checkpoint("any", next(iter(folders.values()))) as one:
            self._config = one.config
        self._calibrations: dict[str, tuple[Calibration, float]] = {}
        self._saved_s = 0.0

    @contextmanager
    def made(
        self, method: str, budget: float | None, folder: Path
    ) -> Iterator[tuple[float, float, Open]]:
        """Yield the bytes against separate models, the seconds it took, and how to open it."""
        start, self._saved_s = time.perf_counter(), 0.0
        if method == "private-int4":
            engines = {
                name: Engine(Int4Source(Checkpoint(name, path)))
                for name, path in self._folders.items()
            }
            seconds = time.perf_counter() - start
            yield int4_ratio(self._config), seconds, engines.__getitem__
            return
        with patch.object(pipeline, "calibrate", self._calibrate_once(pipeline.calibrate)):
            self._consolidate(method, budget, folder)
        seconds = time.perf_counter() - start + self._saved_s
        yield _expert_ratio(folder), seconds, lambda name: Engine.from_pack(folder, resident=1)

    def _consolidate(self, method: str, budget: float | None, out: Path) -> None:
        if method in BUDGETED:
            pipeline.consolidate(
                self._folders,
                out,
                threshold=1.0 if method == "control" else 0.9,
                code="nested",
                budget=f"{budget}x",
                calibration=None if method == "budget-self" else self._texts,
            )
            return
        if method in MERGE_RULES:
            calibration = "none"
            if method in CALIBRATED_MERGES:
                calibration = "text" if self._texts else "self"
            recipe = Recipe(0.9, merge=method, calibration=calibration)
            plan = ConsolidationPlan(recipe, self._same_index())
        else:
            pair = {"nested-4+2": PrivateCode(2, 3), "nested-4+3": PrivateCode(3, 2)}[method]
            plan = ConsolidationPlan(
                Recipe(0.9, code="nested"),
                tuple(
                    layer.with_codes([[(pair, pair)] * len(slot) for slot in layer.slots])
                    for layer in self._same_index()
                ),
            )
        texts = self._texts if plan.recipe.calibration == "text" else None
        pipeline.consolidate(self._folders, out, plan=plan, calibration=texts)

    def _same_index(self) -> tuple[LayerPlan, ...]:
        """Experts of one index share a slot, all of them."""
        labels = list(range(self._config.num_experts)) * len(self._folders)
        return tuple(
            LayerPlan.from_labels(layer, labels, self._config.num_experts)
            for layer in range(self._config.num_layers)
        )

    def _calibrate_once(self, calibrate: Callable[..., Calibration]) -> Callable[..., Calibration]:
        """Calibration, remembered: it is the same under every budget."""

        def once(checkpoints: object, recipe: Recipe, *rest: object) -> Calibration:
            if recipe.calibration == "none":
                return calibrate(checkpoints, recipe, *rest)
            if recipe.calibration in self._calibrations:
                learned, self._saved_s = self._calibrations[recipe.calibration]
                return learned
            start = time.perf_counter()
            learned = calibrate(checkpoints, recipe, *rest)
            self._calibrations[recipe.calibration] = learned, time.perf_counter() - start
            return learned

        return once


def _expert_ratio(folder: Path) -> float:
    with Pack(folder) as pack:
        summary, config = summarise(pack), pack.manifest.config
        # The expert map, and the table of private codes where there is one.
        an_expert = 1 if pack.manifest.nested is None else 5
    map_bytes = an_expert * len(summary.variants) * config.num_layers * config.num_experts
    return (summary.expert_bytes + map_bytes) / summary.separate_expert_bytes


def measure(
    texts: Texts, methods: Methods, names: Sequence[str], method: str, budget: float | None
) -> Row:
    """Make it, score every variant, forget it."""
    scores = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        methods.made(method, budget, Path(folder) / "pack") as (ratio, seconds, open_engine),
    ):
        for name in names:
            with open_engine(name) as engine:
                scores[name] = texts.score(name, engine)
    increases = [one.increase for one in scores.values()]
    kls = [one.kl for one in scores.values()]
    return Row(
        method=method,
        budget=budget,
        expert_ratio=ratio,
        seconds=seconds,
        worst=max(increases),
        mean=sum(increases) / len(increases),
        worst_kl=max(kls),
        mean_kl=sum(kls) / len(kls),
        worst_top1=min(one.top1 for one in scores.values()),
        variants=scores,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, default=EXAMPLES / "checkpoints")
    parser.add_argument("--prefix", default="mini-")
    parser.add_argument("--data", type=Path, default=EXAMPLES / "data")
    parser.add_argument("--calibration", type=Path, help="folder of texts; default: none")
    parser.add_argument("--variants", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.13, 0.16, 0.20, 0.25, 0.32])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    arguments = parser.parse_args()
    folders = {
        name: arguments.checkpoints / f"{arguments.prefix}{name}" for name in arguments.variants
    }
    texts = Texts(folders, arguments.data, context=arguments.context, num_windows=arguments.windows)
    methods = Methods(folders, arguments.calibration)
    heads = "".join(f"{name:>9s}" for name in folders)
    print(f"method              budget   bytes    worst     mean    KL worst  top-1{heads}       s")
    rows, unreachable = [], []
    for method in arguments.methods:
        if method == "budget-text" and arguments.calibration is None:
            continue
        for budget in arguments.budgets if method in BUDGETED else [None]:
            wanted = "" if budget is None else f"{budget:g}x"
            try:
                row = measure(texts, methods, list(folders), method, budget)
            except UsageError as problem:  # a budget below what shared bits alone take
                print(f"{method:18s}  {wanted:>6s}  {problem}", flush=True)
                unreachable.append({"method": method, "budget": budget, "why": str(problem)})
                continue
            each = "".join(f"{one.increase:+9.4f}" for one in row.variants.values())
            print(
                f"{method:18s}  {wanted:>6s}  {row.expert_ratio:.3f}  {row.worst:+.4f}  "
                f"{row.mean:+.4f}  {row.worst_kl:10.5f}  {row.worst_top1:5.1%}{each}  "
                f"{row.seconds:6.1f}",
                flush=True,
            )
            rows.append(asdict(row))
    print_json(
        {
            "benchmark": "compare",
            "cpu": cpu_name(),
            "prefix": arguments.prefix,
            "windows": arguments.windows,
            "context": arguments.context,
            "calibration": "text" if arguments.calibration else "self",
            "originals": {name: score.nll for name, score in texts.originals.items()},
            "rows": rows,
            "unreachable": unreachable,
        }
    )


if __name__ == "__main__":
    main()

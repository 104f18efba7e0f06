"""The published Switch experiment, every variant scored on its own task: 2, 3 and 4 variants.

Switch checkpoints of one ancestor are consolidated in several ways, all at the bytes of one model's
experts (1/N of N separate ones), and each variant answers its own evaluation pairs from the pack:

  NLL      nats per target token, teacher-forced, the end token included
  answers  greedy: exact match where an answer is a label, ROUGE-L (F1) where it is a text
  same     answers that are, token by token, those of the variant alone

`average`, `ties`, `task-arithmetic`, `regmean` and `round-robin` (as published: slot i takes the
expert of model i mod N) leave one expert an index for all; every variant keeps its router and its
other weights, which favours them over merging whole models. The first model is the base that ties
and task-arithmetic count from. `nested-4+3` needs no data; `budget-text` and `regmean` learn from
calibration pairs.

A variant without pairs of its own (the base) is scored on what it was trained for: spans cut out of
the texts english and tldr, to be filled in.

Run: python benchmarks/switch.py base=DIR/switch-base langid=DIR/switch-langid \\
       shell=DIR/switch-shell codesum=DIR/switch-codesum --data EVAL --calibration CALIBRATION
MODELs are folders, or ORG/NAME on the hub. EVAL and CALIBRATION hold [switch-]NAME.jsonl with
{"input": ..., "target": ...} a line.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _common import print_json
from _methods import Methods
from _subjects import Subject, folders_of, open_original
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer

from moeconsolidate.pairs import Pair, TokenPair, encode_pairs, read_pairs
from moeconsolidate.texts import read_texts
from moeruntime import Engine, Request, SamplingParams
from moeruntime.bench.machine import cpu_name

METHODS = (
    "average",
    "ties",
    "task-arithmetic",
    "regmean",
    "round-robin",
    "nested-4+3",
    "budget-text",
)
SPAN_TEXTS = ("english", "tldr")
SPAN_TOKENS = 120
"""Of a text, from its start, that spans are cut out of."""


@dataclass(frozen=True)
class Score:
    """One variant on its own pairs: `answers` is what its metric says of them."""

    nll: float
    metric: str
    answers: float
    same: float = 1.0


@dataclass(frozen=True)
class Task:
    """A variant's evaluation: token ids, the wanted texts, and how answers are compared."""

    pairs: list[TokenPair]
    targets: list[str]
    metric: str

    def compare(self, texts: Sequence[str]) -> float:
        """Mean of exact matches, or of ROUGE-L."""
        if self.metric == "exact":
            hits = [
                text.strip() == wanted for text, wanted in zip(texts, self.targets, strict=True)
            ]
            return sum(hits) / len(hits)
        scorer = RougeScorer(["rougeL"])
        scores = [
            scorer.score(wanted, text)["rougeL"].fmeasure
            for text, wanted in zip(texts, self.targets, strict=True)
        ]
        return sum(scores) / len(scores)


def span_pairs(files: Sequence[Path], tokenizer: Tokenizer) -> Iterator[Pair]:
    """Cut 15 % of the tokens out, in spans of 3 on average, as span corruption does (T5)."""
    rng = random.Random(0)
    for path in files:
        for text in read_texts(path):
            ids = tokenizer.encode(text, add_special_tokens=False).ids[:SPAN_TOKENS]
            num_spans = min(25, max(1, round(0.05 * len(ids))))
            kept, wanted = "", ""
            at = 0
            for number in range(num_spans):
                here = len(ids) * number // num_spans
                start = max(at, here + rng.randrange(max(1, len(ids) // num_spans - 3)))
                stop = min(len(ids), start + rng.randint(1, 5))
                mark = f"<extra_id_{number}>"
                kept += tokenizer.decode(ids[at:start]) + mark
                wanted += mark + tokenizer.decode(ids[start:stop])
                at = stop
            yield Pair(kept + tokenizer.decode(ids[at:]), wanted)


def pairs_of(folder: Path, name: str, model: Path, scratch: Path) -> Path:
    """The file of a variant's pairs; made of spans, and then mixed, where there is none."""
    for file in (folder / f"switch-{name}.jsonl", folder / f"{name}.jsonl"):
        if file.exists():
            return file
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    pairs = list(span_pairs([folder / f"{text}.jsonl" for text in SPAN_TEXTS], tokenizer))
    random.Random(0).shuffle(pairs)
    path = scratch / f"{folder.name}-{name}.jsonl"
    path.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs))
    return path


def score(engine: Engine, name: str, task: Task, alone: list[tuple[int, ...]]) -> Score:
    """Score one variant; `alone` has its own answers, or takes them if it is empty."""
    logprobs = engine.score(
        name, [pair.target for pair in task.pairs], [pair.source for pair in task.pairs]
    )
    nll = -float(torch.cat(logprobs).double().mean())
    longest = max(len(pair.target) for pair in task.pairs)
    outputs = engine.generate(
        Request(name, pair.source, SamplingParams(max_tokens=longest)) for pair in task.pairs
    )
    answers = [output.token_ids for output in outputs]
    if not alone:
        alone += answers
    same = sum(ours == theirs for ours, theirs in zip(answers, alone, strict=True)) / len(alone)
    return Score(nll, task.metric, task.compare([output.text for output in outputs]), same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL", help="the base first")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--exact", nargs="*", default=["langid"], help="whose answers are labels")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pairs", type=int, default=300, help="of each variant")
    parser.add_argument("--tokens", type=int, nargs=2, default=[128, 48], help="input, target")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # these models are too small to be cut in two
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        subjects = [
            Subject(
                name,
                folder,
                (pairs_of(arguments.data, name, folder, scratch),),
                (pairs_of(arguments.calibration, name, folder, scratch),),
            )
            for name, folder in folders_of(arguments.models).items()
        ]
        rows = list(measured(subjects, arguments, scratch))
    print_json({"benchmark": "switch", "cpu": cpu_name(), "pairs": arguments.pairs, "rows": rows})


def measured(
    subjects: Sequence[Subject], arguments: argparse.Namespace, scratch: Path
) -> Iterator[dict[str, object]]:
    """Each variant alone, then every count and method; prints rows as they come."""
    tasks: dict[str, Task] = {}
    answers: dict[str, list[tuple[int, ...]]] = {one.name: [] for one in subjects}
    alone: dict[str, Score] = {}
    print("variants  method              bytes   variant   NLL      increase  answers  same")
    for subject in subjects:
        with open_original(subject) as engine:
            text = engine.text(subject.name)
            pairs = read_pairs(subject.eval[0])[: arguments.pairs]
            encoded = encode_pairs(text, pairs, *arguments.tokens)
            targets = [text.tokenizer.decode(pair.target) for pair in encoded]
            metric = "exact" if subject.name in arguments.exact else "rougeL"
            tasks[subject.name] = Task(encoded, targets, metric)
            alone[subject.name] = score(
                engine, subject.name, tasks[subject.name], answers[subject.name]
            )
        yield report(1, "alone", 1.0, {subject.name: alone[subject.name]}, alone)
    for count in arguments.counts:
        methods = Methods(subjects[:count])
        for method in arguments.methods:
            budget = 1 / count if method == "budget-text" else None
            folder = scratch / f"{count}-{method}"
            with methods.made(method, budget, folder) as (ratio, _, open_engine):
                scores = {}
                for one in subjects[:count]:
                    with open_engine(one.name) as engine:
                        scores[one.name] = score(
                            engine, one.name, tasks[one.name], answers[one.name]
                        )
            yield report(count, method, ratio, scores, alone)


def report(
    count: int, method: str, ratio: float, scores: dict[str, Score], alone: dict[str, Score]
) -> dict[str, object]:
    """Print a row a variant, and give all of them."""
    for name, one in scores.items():
        print(
            f"{count:8d}  {method:18s}  {ratio:.3f}  {name:8s}  {one.nll:7.4f}  "
            f"{one.nll - alone[name].nll:+8.4f}  {one.answers:7.3f}  {one.same:5.1%}",
            flush=True,
        )
    variants = {name: asdict(one) for name, one in scores.items()}
    return {"count": count, "method": method, "expert_ratio": ratio, "variants": variants}


if __name__ == "__main__":
    main()

"""Which variants a benchmark compares, their texts, and how they are scored.

Every variant is scored on its own text against its original, window by window: the increase of its
negative log-likelihood, nats per token; and, since merging can lower a loss and still change what a
model says, its fidelity to the original: the mean KL divergence of its predictions from the
original's, and how often both predict the same token first. With `cross`, on the others' texts too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import EXAMPLES
from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.hub.obtain import obtain
from moeconsolidate.original import CheckpointSource
from moeconsolidate.sources import parse_sources
from moeconsolidate.texts import read_texts
from moeruntime import Engine

TEXTS = {"base": ("english", "tldr"), "python": ("python",), "math": ("math",), "shell": ("shell",)}
MORE = ("prose", "tldr", "langid", "codesum")
"""What finetune.py makes; each has a text of its own name."""


@dataclass(frozen=True)
class Subject:
    """A variant; it is scored on `eval` texts, each counting alike, and calibrated on `texts`."""

    name: str
    folder: Path
    eval: tuple[Path, ...]
    texts: tuple[Path, ...] | None


@dataclass(frozen=True)
class Score:
    """One variant on its own text; without a reference the next three compare with nothing.

    `outside`: the increase on each text of others.
    """

    nll: float
    increase: float = 0.0
    kl: float = 0.0
    top1: float = 1.0
    outside: dict[str, float] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", type=Path, default=EXAMPLES / "checkpoints")
    parser.add_argument("--prefix", default="mini-")
    parser.add_argument("--data", type=Path, default=EXAMPLES / "data")
    parser.add_argument("--calibration", type=Path, help="folder of texts; default: none")
    parser.add_argument("--more", type=Path, help="folder that finetune.py wrote: more variants")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="default: all there are")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)


def subjects_of(arguments: argparse.Namespace) -> list[Subject]:
    """All variants that the arguments name, in order."""
    known = {
        name: Subject(
            name,
            arguments.checkpoints / f"{arguments.prefix}{name}",
            tuple(arguments.data / f"{text}.jsonl" for text in texts),
            tuple(arguments.calibration / f"{text}.jsonl" for text in texts)
            if arguments.calibration
            else None,
        )
        for name, texts in TEXTS.items()
    }
    if arguments.more:
        known |= {
            name: Subject(
                name,
                arguments.more / name,
                (arguments.more / "eval" / f"{name}.jsonl",),
                (arguments.more / "texts" / f"{name}.jsonl",) if arguments.calibration else None,
            )
            for name in MORE
        }
    chosen = arguments.variants or list(known)
    if unknown := sorted(set(chosen) - set(known)):
        raise SystemExit(f"unknown variant {unknown[0]}; known: {', '.join(known)}")
    return [known[name] for name in chosen]


class Scorer:
    """Each variant's windows, and what its original predicts for them."""

    def __init__(
        self, subjects: Sequence[Subject], *, context: int, num_windows: int, cross: bool = False
    ) -> None:
        self._own: dict[str, list[str]] = {}
        self._windows: dict[str, list[list[int]]] = {}
        self._predictions: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
        self._outside: dict[tuple[str, str], float] = {}
        self.originals: dict[str, Score] = {}
        for subject in subjects:
            with open_original(subject) as engine:
                encode = engine.text(subject.name).encode_document
                self._own[subject.name] = [
                    self._add_text(path, encode, context, num_windows) for path in subject.eval
                ]
        for subject in subjects:
            with open_original(subject) as engine:
                nll = 0.0
                for text in self._own[subject.name]:
                    nll += self._keep(subject.name, text, engine) / len(self._own[subject.name])
                for text in self._others(subject.name) if cross else ():
                    self._outside[subject.name, text] = self._nll(subject.name, text, engine)
                self.originals[subject.name] = Score(nll)

    def score(self, name: str, engine: Engine) -> Score:
        """One variant, from wherever the engine has it."""
        texts = self._own[name]
        totals = torch.zeros(3, dtype=torch.float64)
        for text in texts:
            sums = torch.zeros(3, dtype=torch.float64)
            windows = self._windows[text]
            for ids, (original, first_T), logprobs_TV in zip(
                windows, self._predictions[name, text], engine.logprobs(name, windows), strict=True
            ):
                original_TV = original.float().log_softmax(dim=-1)
                ours_TV = logprobs_TV[:-1]
                kl_T = F.kl_div(ours_TV, original_TV, reduction="none", log_target=True).sum(-1)
                same_T = ours_TV.argmax(-1) == first_T
                sums += torch.tensor(
                    [_mean_nll(ids, logprobs_TV), float(kl_T.mean()), float(same_T.float().mean())]
                )
            totals += sums / len(windows) / len(texts)
        nll, kl, top1 = totals.tolist()
        outside = {
            text: self._nll(name, text, engine) - before
            for (variant, text), before in self._outside.items()
            if variant == name
        }
        return Score(nll, nll - self.originals[name].nll, kl, top1, outside)

    def _add_text(self, path: Path, encode: object, context: int, num_windows: int) -> str:
        """Cut a text into windows, once; a text that is there under another name keeps that."""
        stream = [token for document in read_texts(path) for token in encode(document)]  # type: ignore[operator]
        usable = min(len(stream) // context, num_windows) * context
        windows = [stream[at : at + context] for at in range(0, usable, context)]
        if not windows:
            raise SystemExit(f"{path}: less than a window of {context} tokens")
        for name, others in self._windows.items():
            if others == windows:
                return name
        name = path.stem if path.stem not in self._windows else f"{path.stem}@{path.parent.name}"
        self._windows[name] = windows
        return name

    def _others(self, name: str) -> list[str]:
        return [text for text in self._windows if text not in self._own[name]]

    def _keep(self, name: str, text: str, engine: Engine) -> float:
        """Remember an original's predictions; half precision, whose errors are far below."""
        windows, kept, losses = self._windows[text], [], []
        for ids, logprobs_TV in zip(windows, engine.logprobs(name, windows), strict=True):
            losses.append(_mean_nll(ids, logprobs_TV))
            kept.append((logprobs_TV[:-1].half(), logprobs_TV[:-1].argmax(-1)))
        self._predictions[name, text] = kept
        return sum(losses) / len(losses)

    def _nll(self, name: str, text: str, engine: Engine) -> float:
        windows = self._windows[text]
        losses = [
            _mean_nll(ids, logprobs_TV)
            for ids, logprobs_TV in zip(windows, engine.logprobs(name, windows), strict=True)
        ]
        return sum(losses) / len(losses)


def folders_of(models: Sequence[str]) -> dict[str, Path]:
    """Folders of [NAME=]MODEL arguments by name; models of the hub are downloaded."""
    sources = parse_sources(models)
    folders = {name: model.snapshot for name, model in obtain(sources, lambda _: None).items()}
    return {
        one.name: one.origin if isinstance(one.origin, Path) else folders[one.name]
        for one in sources
    }


def open_original(subject: Subject) -> Engine:
    return Engine(CheckpointSource(Checkpoint(subject.name, subject.folder)))


def _mean_nll(ids: Sequence[int], logprobs_TV: Tensor) -> float:
    """Over a window's predicted tokens."""
    return -float(logprobs_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None]).double().mean())

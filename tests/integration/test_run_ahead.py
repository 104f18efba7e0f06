"""The next step is launched before the last one's tokens are seen: with a stand-in for the graphs.

CUDA graphs need a GPU; what the engine does around them does not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeruntime import Engine, Output, Request, SamplingParams
from moeruntime.models import Batch
from moeruntime.models.batch import Span

VARIANTS = ("base", "python", "math", "shell")
MAX_SEQUENCES = 3


class PlainGraphs:
    """What `StepGraphs` promises, by the reference decoder: steps go on from their tokens."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.max_tokens = 64
        self._spans: Sequence[Span] = ()
        self._tokens = torch.empty(0)
        self.num_ahead = 0
        self.num_ahead_of_waiting = 0

    def run(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        self._spans = spans
        return self._step()

    def run_on(self, num_rows: int) -> tuple[Tensor, Tensor]:
        assert num_rows == len(self._spans)
        self.num_ahead += 1
        self.num_ahead_of_waiting += bool(self._engine.scheduler.waiting)
        self._spans = [
            replace(span, token_ids=[int(token)], start=span.start + 1)
            for span, token in zip(self._spans, self._tokens, strict=True)
        ]
        return self._step()

    def _step(self) -> tuple[Tensor, Tensor]:
        batch = Batch.build(self._spans, self._engine.device)
        model = self._engine.model
        logits_TV = model.logits(model.forward(batch), batch.groups)
        # Those that sample replace some of these in place, and the next step begins with them.
        self._tokens = logits_TV.argmax(dim=-1)
        return logits_TV, self._tokens


@pytest.fixture
def engine(pack: Path) -> Iterator[Engine]:
    with Engine.from_pack(pack, device="cpu", max_sequences=MAX_SEQUENCES) as loaded:
        yield loaded


@pytest.fixture
def graphs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> PlainGraphs:
    stand_in = PlainGraphs(engine)
    monkeypatch.setattr(engine._runner, "_graphs", stand_in)
    return stand_in


def make_requests(count: int) -> list[Request]:
    """Short and long ones, some of which sample, some of which end at a stop string."""
    numbers = random.Random(count)
    return [
        Request(
            numbers.choice(VARIANTS),
            [numbers.randrange(32, 4000) for _ in range(numbers.randint(1, 40))],
            SamplingParams(
                max_tokens=numbers.choice((1, 3, 12, 25, 40)),
                temperature=numbers.choice((0.0, 0.0, 0.8)),
                seed=number,
                stop=numbers.choice(((), (), ("e",), ("the",))),
            ),
        )
        for number in range(count)
    ]


def is_clean(engine: Engine) -> bool:
    all_free = engine.num_free_blocks == engine.memory.num_blocks
    return engine.scheduler.idle and all_free and engine.residency.num_held == 0


def test_running_ahead_changes_no_answer(
    engine: Engine, graphs: PlainGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests(24)
    ahead = engine.generate(requests)
    assert is_clean(engine)
    assert graphs.num_ahead > 20
    assert graphs.num_ahead_of_waiting > 5, "a full batch goes on although others wait"
    monkeypatch.setattr(engine._runner, "_graphs", None)
    assert engine.generate(requests) == ahead
    assert {output.finish_reason for output in ahead} == {"stop", "length"}


def test_steps_ahead_are_paid_for(
    engine: Engine, graphs: PlainGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    paid: list[int] = []

    def ran(decoded: Sequence[object], num_prompt_tokens: int) -> None:
        paid.append(len(decoded))

    monkeypatch.setattr(engine.scheduler.waiting, "ran", ran)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    engine.generate([Request("base", [1, 2, 3], params), Request("math", [4, 5, 6], params)])
    assert graphs.num_ahead > 5
    assert sum(paid) == 2 * 8, "all tokens but the first, which the prompt pays for"


def test_whoever_comes_while_a_step_is_ahead_is_served_like_the_others(
    engine: Engine, graphs: PlainGraphs
) -> None:
    first, second, third = make_requests(3)
    long = SamplingParams(max_tokens=30)
    requests = [replace(request, sampling=long) for request in (first, second, third)]
    expected = [engine.generate([request])[0] for request in requests]
    found: dict[int, Output] = {}
    ids = []
    for request in requests:
        ids.append(engine.submit(request))
        for _ in range(5):  # in the middle of the others' steps
            found.update({d.request_id: d.output for d in engine.step() if d.output})
    while len(found) < len(ids):
        found.update({d.request_id: d.output for d in engine.step() if d.output})
    assert [found[request_id] for request_id in ids] == expected
    assert graphs.num_ahead > 0
    assert is_clean(engine)


def test_aborting_while_a_step_is_ahead_leaves_nothing(engine: Engine, graphs: PlainGraphs) -> None:
    request = Request("math", [50, 60, 70], SamplingParams(max_tokens=30))
    (expected,) = engine.generate([request])
    dropped, kept = engine.submit(request), engine.submit(request)
    for _ in range(4):
        engine.step()
    assert graphs.num_ahead > 0
    engine.abort(dropped)
    outputs = []
    while not outputs:
        deltas = engine.step()
        assert all(delta.request_id == kept for delta in deltas)
        outputs = [delta.output for delta in deltas if delta.output]
    assert outputs == [expected]
    assert is_clean(engine)

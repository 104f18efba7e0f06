"""Prompts in a file say no more than they want to."""

from __future__ import annotations

import json
from pathlib import Path

from moeruntime import SamplingParams
from moeruntime.prompt_file import read_prompts


def test_null_is_not_given_and_every_seed_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "x", "stop": None, "seed": None}, {"prompt": "y", "seed": 2**64 - 1}]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    default = SamplingParams(stop=("end",), seed=3)
    _, requests = read_prompts(path, "base", chat=False, default=default)
    assert [(one.sampling.stop, one.sampling.seed) for one in requests] == [
        (("end",), 3),
        (("end",), 2**64 - 1),
    ]

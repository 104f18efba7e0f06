"""What several tests of the runtime need: packs with common tensors, transformers as the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers import TINY_CONFIG, random_tensors
from moeconsolidate import consolidate
from moeruntime import Engine, Output, Request

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TEXTS_OF = {"base": "english", "python": "python", "math": "math", "shell": "shell"}

# What the variants of `pack_with_common_tensors` share: an embedding and an o_proj as they are, and
# a q_proj whose k_proj and v_proj differ, so that the parameter made of the three is not shared.
COMMON_TENSORS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
)


def checkpoints_with_common_tensors(
    make_checkpoint: Callable[..., Path], names: Iterable[str]
) -> dict[str, Path]:
    """Tiny random checkpoints that differ in everything but `COMMON_TENSORS`."""
    original = random_tensors(TINY_CONFIG, 0)

    def keep_common(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: original[name] for name in COMMON_TENSORS})

    return {
        name: make_checkpoint(name, seed=10 + idx, edit=keep_common)
        for idx, name in enumerate(names)
    }


def pack_with_common_tensors(make_checkpoint: Callable[..., Path], out: Path) -> Path:
    """A lossless pack of three variants that share `COMMON_TENSORS`."""
    folders = checkpoints_with_common_tensors(make_checkpoint, "abc")
    return consolidate(folders, out, threshold=1.0).pack


def texts(name: str) -> list[str]:
    """The documents of examples/data/NAME.jsonl."""
    lines = (EXAMPLES / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def load_reference(folder: Path, device: str = "cpu") -> Any:
    """The checkpoint in transformers, fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.to(device).eval()


@torch.inference_mode()
def reference_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """[T, V] of one sequence."""
    return model(torch.tensor([list(ids)], device=model.device)).logits[0].float().cpu()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((actual - expected).abs().max() / expected.abs().max())


def engine_logits(engine: Engine, variant: str, ids: Sequence[int], cuts: Sequence[int]) -> Tensor:
    """Logits [T, V] from the engine's own model, fed `cuts` tokens a step."""
    from moeruntime.kv_cache import blocks_for
    from moeruntime.models import Batch
    from moeruntime.models.batch import Span

    assert sum(cuts) == len(ids)
    table = list(range(blocks_for(len(ids))))
    assert engine.residency.admit(variant)
    variant_idx = engine.source.manifest.variant_names.index(variant)
    start, rows = 0, []
    try:
        slot = engine.residency.slot(variant)
        engine.residency.wait_for(variant)
        for count in cuts:
            span = Span(
                slot,
                variant_idx,
                ids[start : start + count],
                start,
                table[: blocks_for(start + count)],
            )
            batch = Batch.build([span], engine.device)
            rows.append(engine.model.logits(engine.model.forward(batch), batch.groups).cpu())
            start += count
    finally:
        engine.residency.release(variant)
    return torch.cat(rows)


def assert_same_greedy(
    actual: Sequence[int],
    expected: Sequence[int],
    logits_after: Callable[[Sequence[int]], Tensor],
    prompt: Sequence[int],
    *,
    margin: float = 1e-4,
) -> None:
    """Equal token ids; where two choices first part, the reference must call it a tie.

    Args:
        actual: what is tested.
        expected: the reference's choice.
        logits_after: ids -> the reference's logits [V] after them.
        prompt: what both went on from.
        margin: two logits closer than this are a tie; both sides round differently.
    """
    for at, (mine, theirs) in enumerate(zip(actual, expected, strict=False)):
        if mine != theirs:
            logits_V = logits_after([*prompt, *expected[:at]])
            gap = float(logits_V[theirs] - logits_V[mine])
            assert abs(gap) <= margin, f"token {at}: {mine}, not {theirs}, which leads by {gap:.5f}"
            return
    assert len(actual) == len(expected)


def drain(engine: Engine, *, arrivals: Iterable[Sequence[Request]] = ()) -> dict[int, Output]:
    """Step until nothing is left, submitting one group of arrivals before each step."""
    outputs: dict[int, Output] = {}
    waiting = iter(arrivals)
    while True:
        group = next(waiting, None)
        for request in group or ():
            engine.submit(request)
        for delta in engine.step():
            if delta.output is not None:
                outputs[delta.request_id] = delta.output
        if group is None and engine.scheduler.idle:
            return outputs

"""What each expert's errors cost, learned from text: streamed through a model a block at a time.

For every expert the compiler wants to know which inputs it really sees and which of its outputs the
loss depends on. One forward sweep keeps each block's input; one backward sweep recomputes a block
with gradients of activations (never of weights), takes what it needs, and hands the gradient down.
Only one block's weights are in memory; inputs and what was learned wait on disk.

What matters is the Fisher information of the model's own predictions (labels from the text would
give the "empirical" Fisher instead). At the logits of a token it is diag(p) - p p^T; gradients that
start from random vectors of just that covariance square to an unbiased estimate of it. Gradients of
labels that are drawn from the model have the same covariance and vary far more: nearly all of them
say that the likeliest token was right.

Legend: W windows of T tokens, N tokens of a window batch, H hidden, I intermediate, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.importance import ExpertStatistics, SpooledLayers, Statistics, watched_experts
from moeconsolidate.spool import Spool
from moeconsolidate.streaming import (
    BATCH_WINDOWS,
    ExpertWork,
    embed,
    output_logits,
    predictions,
    streamed_block,
)
from moeruntime.families import ModelConfig

__all__ = ["collect", "random_probe"]


def collect(
    checkpoint: Checkpoint,
    windows: Tensor,
    *,
    seed: int = 0,
    on_block: Callable[[int], None] | None = None,
) -> Statistics:
    """Run calibration text through one model.

    Args:
        checkpoint: the model.
        windows: token ids, as `streaming` has them.
        seed: of the random signs that gradients start from.
        on_block: called after each block, forward and backward, with how many are done.
    """
    config = checkpoint.config
    spool = Spool()
    hidden = embed(checkpoint, windows)
    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        if on_block:
            on_block(done)

    for number in range(len(config.blocks)):
        spool.put(f"input-{number}", hidden)
        hidden = streamed_block(checkpoint, number).run(hidden, windows)
        report()
    gradients, num_tokens = _output_gradient(checkpoint, hidden, windows, seed)
    layers = SpooledLayers(spool, config.num_layers)
    routed = []
    for number in reversed(range(len(config.blocks))):
        block = streamed_block(checkpoint, number)
        taps = None
        if block.layer is not None:
            taps = _Taps(config, watched_experts(block.layer, config.num_experts))
        below = []
        for x, ids, gradient in zip(
            spool.get(f"input-{number}").split(BATCH_WINDOWS),
            windows.split(BATCH_WINDOWS),
            gradients.split(BATCH_WINDOWS),
            strict=True,
        ):
            x = x.requires_grad_()  # noqa: PLW2901 - a leaf of its own
            block.forward(x, ids, taps).backward(gradient)
            if taps is not None:
                taps.count()
            assert x.grad is not None
            below.append(x.grad)
        gradients = torch.cat(below)
        spool.drop(f"input-{number}")
        if block.layer is not None and taps is not None:
            layers.put(block.layer, {"gate_up": taps.gate_up, "down": taps.down})
            routed.append(taps.num_routed_E)
        report()
    return Statistics(num_tokens, layers, torch.stack(routed[::-1]))


class _Taps:
    """Collects, during one layer's forward pass, what its backward pass will fill in."""

    def __init__(self, config: ModelConfig, watched: Sequence[int]) -> None:
        experts, shapes = config.num_experts, config.part_shapes
        self.gate_up = ExpertStatistics.zeros(experts, *shapes["gate_up"], watched)
        self.down = ExpertStatistics.zeros(experts, *shapes["down"], watched)
        self.num_routed_E = torch.zeros(experts, dtype=torch.int64)
        self._pending: list[ExpertWork] = []

    def watch(self, work: ExpertWork) -> None:
        """Remember an expert's inputs and outputs of this pass."""
        work.gate_up_NI.retain_grad()
        work.out_NH.retain_grad()
        self._pending.append(work)

    def count(self) -> None:
        """Add what the backward pass found."""
        with torch.no_grad():
            for work in self._pending:
                assert work.gate_up_NI.grad is not None and work.out_NH.grad is not None
                self.gate_up.add(work.expert, work.x_NH, work.gate_up_NI.grad)
                self.down.add(work.expert, work.inner_NI, work.out_NH.grad)
                self.num_routed_E[work.expert] += len(work.x_NH)
        self._pending.clear()


def _output_gradient(
    checkpoint: Checkpoint, hidden: Tensor, windows: Tensor, seed: int
) -> tuple[Tensor, int]:
    """Gradient of `random_probe` at the last block's output, a window at a time.

    Returns:
        The gradient, in the shape of `hidden`, and how many tokens were predicted.
    """
    to_logits = output_logits(checkpoint)
    generator = torch.Generator().manual_seed(seed)
    gradients, num_tokens = [], 0
    for window, ids in zip(hidden, windows, strict=True):
        leaf = window.detach().requires_grad_()
        logits_TV = to_logits(predictions(leaf, ids)[0])
        logits_TV.backward(random_probe(logits_TV.detach(), generator))
        assert leaf.grad is not None
        gradients.append(leaf.grad)
        num_tokens += len(logits_TV)
    return torch.stack(gradients), num_tokens


def random_probe(logits_TV: Tensor, generator: torch.Generator) -> Tensor:
    """Random vectors whose covariance is the Fisher information of softmax(logits).

    With p the probabilities and s random signs, z = sqrt(p) s - p (sqrt(p) . s) has mean 0 and
    covariance diag(p) - p p^T.

    Args:
        logits_TV: float32.
        generator: of the signs.

    Returns:
        float32 [T, V], independent from token to token.
    """
    signs_TV = torch.randint(0, 2, logits_TV.shape, generator=generator, dtype=torch.int8)
    probability_TV = logits_TV.softmax(dim=-1)
    signed_TV = probability_TV.sqrt().mul_(signs_TV.mul_(2).sub_(1))
    return signed_TV - probability_TV * signed_TV.sum(dim=-1, keepdim=True)

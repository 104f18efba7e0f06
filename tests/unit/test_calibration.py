"""Streamed calibration against transformers, with a weight of its own for every token.

Legend: W windows of T tokens, H hidden, E experts, R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import TINY_CONFIG, MakeCheckpoint
from moeconsolidate import calibration
from moeconsolidate.calibration import collect, random_probe
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.importance import Statistics
from moeconsolidate.streaming import embed, streamed_block
from runtime_fixtures import load_reference

WINDOWS = torch.randint(4096, (3, 11), generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "plain": {},
    "window": {"sliding_window": 4},
    "one expert a token": {"num_experts_per_tok": 1},
    "tied": {"tie_word_embeddings": True},
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def folder(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("tiny", seed=3, config=request.param)


class TokenWeights:
    """Stands in for the experts of one transformers layer: every token has copies of its own."""

    def __init__(self, experts: Any) -> None:
        self.gate_up, self.down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        self.copies: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []

    def __call__(self, hidden_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        rows = []
        for x_H, experts, weights in zip(hidden_NH, experts_NK, weights_NK, strict=True):
            total_H = torch.zeros_like(x_H)
            for expert, weight in zip(experts.tolist(), weights, strict=True):
                gate_up = self.gate_up[expert].clone().requires_grad_()
                down = self.down[expert].clone().requires_grad_()
                gate, up = (gate_up @ x_H).chunk(2)
                inner = F.silu(gate) * up
                total_H = total_H + weight * (down @ inner)
                self.copies.append((expert, x_H.detach(), gate_up, inner.detach(), down))
            rows.append(total_H)
        return torch.stack(rows)

    def sums(self, part: str) -> tuple[Tensor, Tensor, Tensor]:
        """From the gradients of the copies: sum of G^T G, of each row's square, and tokens."""
        num_experts = len(self.gate_up)
        shape = (self.gate_up if part == "gate_up" else self.down).shape[1:]
        inputs_ECC = torch.zeros(num_experts, shape[1], shape[1], dtype=torch.float64)
        outputs_ER = torch.zeros(num_experts, shape[0], dtype=torch.float64)
        counts_E = torch.zeros(num_experts, dtype=torch.int64)
        for expert, x_H, gate_up, inner_I, down in self.copies:
            weight, x_C = (gate_up, x_H) if part == "gate_up" else (down, inner_I)
            assert weight.grad is not None
            gradient_RC = weight.grad.double()
            inputs_ECC[expert] += gradient_RC.T @ gradient_RC
            outputs_ER[expert] += gradient_RC.square().sum(dim=1) / x_C.double().square().sum()
            counts_E[expert] += 1
        return inputs_ECC, outputs_ER, counts_E


def brute_force(folder: Path, seed: int) -> list[TokenWeights]:
    """Gradients of random signs at transformers' logits, through all layers."""
    model = load_reference(folder)
    watchers = []
    for layer in model.model.layers:
        watchers.append(TokenWeights(layer.mlp.experts))
        layer.mlp.experts.forward = watchers[-1]
    generator = torch.Generator().manual_seed(seed)
    for window_T in WINDOWS:
        logits_TV = model(window_T[None]).logits[0].float()
        signs_TV = torch.randint(0, 2, logits_TV.shape, generator=generator, dtype=torch.int8)
        root_TV = logits_TV.detach().softmax(-1).sqrt()
        signed_TV = root_TV * (2.0 * signs_TV - 1)
        logits_TV.backward(signed_TV - root_TV.square() * signed_TV.sum(-1, keepdim=True))
    return watchers


def statistics_of(folder: Path, seed: int = 0) -> Statistics:
    with Checkpoint("tiny", folder) as checkpoint:
        return collect(checkpoint, WINDOWS, seed=seed)


def test_statistics_are_those_of_gradients_of_every_tokens_weights(folder: Path) -> None:
    found, expected = statistics_of(folder, seed=5), brute_force(folder, seed=5)
    assert found.num_tokens == WINDOWS.numel()
    for layer, (parts, watcher) in enumerate(zip(found.layers, expected, strict=True)):
        for part in ("gate_up", "down"):
            inputs_ECC, outputs_ER, counts_E = watcher.sums(part)
            largest = float(inputs_ECC.abs().max())
            error = float((parts[part].inputs_EKK[0].double() - inputs_ECC).abs().max())
            assert error < 1e-4 * largest, (layer, part)
            error = float((parts[part].outputs_ER.double() - outputs_ER).abs().max())
            assert error < 1e-4 * float(outputs_ER.max()), (layer, part)
            assert found.num_routed_LE[layer].tolist() == counts_E.tolist()


def test_probes_have_the_covariance_of_the_fisher_information() -> None:
    logits_V = torch.tensor([2.0, 0.0, -1.0, 1.0, -4.0])
    num_probes = 200_000
    probe_NV = random_probe(logits_V.expand(num_probes, -1), torch.Generator().manual_seed(0))
    p_V = logits_V.softmax(-1)
    expected_VV = p_V.diag() - p_V.outer(p_V)
    # Entries vary by less than 1, so their means by less than 1 / sqrt(N) = 0.0022.
    torch.testing.assert_close(
        probe_NV.T @ probe_NV / num_probes, expected_VV, rtol=0, atol=5 / num_probes**0.5
    )
    assert float(probe_NV.mean(dim=0).abs().max()) < 5 / num_probes**0.5
    assert float(probe_NV.sum(dim=-1).abs().max()) < 1e-5  # nothing for what softmax ignores


def test_probes_vary_less_than_drawn_labels() -> None:
    logits_V = torch.tensor([4.0, 0.0, 0.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    probe_NV = random_probe(logits_V.expand(20_000, -1), generator)
    p_V = logits_V.softmax(-1)
    drawn_N = p_V.multinomial(20_000, replacement=True, generator=generator)
    label_NV = p_V - torch.eye(4)[drawn_N]
    squares = [one_NV.square().sum(-1) for one_NV in (probe_NV, label_NV)]
    torch.testing.assert_close(squares[0].mean(), squares[1].mean(), rtol=0.1, atol=0)
    assert squares[0].var() < squares[1].var() / 3


def test_layers_are_those_of_transformers(folder: Path) -> None:
    model = load_reference(folder)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad():
        model(WINDOWS)
    with Checkpoint("tiny", folder) as checkpoint, torch.no_grad():
        hidden_WTH = embed(checkpoint, WINDOWS)
        for idx, expected in enumerate(seen):
            hidden_WTH = streamed_block(checkpoint, idx).run(hidden_WTH, WINDOWS)
            torch.testing.assert_close(hidden_WTH, expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == TINY_CONFIG["num_hidden_layers"]


def test_a_sliding_window_changes_what_is_seen(make_checkpoint: MakeCheckpoint) -> None:
    whole = statistics_of(make_checkpoint("whole", seed=3))
    narrow = statistics_of(make_checkpoint("narrow", seed=3, config={"sliding_window": 2}))
    wide = statistics_of(make_checkpoint("wide", seed=3, config={"sliding_window": 11}))
    for layer in range(2):
        sums = [one.layers[layer]["down"].outputs_ER for one in (whole, narrow, wide)]
        assert not torch.allclose(sums[0], sums[1], rtol=1e-2)
        torch.testing.assert_close(sums[0], sums[2])


def test_the_same_text_and_seed_give_the_same_bits(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint("tiny", seed=3)
    first, second, other = (statistics_of(folder, seed) for seed in (0, 0, 1))
    for layer in range(2):
        for part in ("gate_up", "down"):
            ours, again = first.layers[layer][part], second.layers[layer][part]
            assert torch.equal(ours.inputs_EKK[0], again.inputs_EKK[0])
            assert torch.equal(ours.outputs_ER, again.outputs_ER)
            assert not torch.equal(ours.outputs_ER, other.layers[layer][part].outputs_ER)
    monkeypatch.setattr(calibration, "BATCH_WINDOWS", 1)
    alone = statistics_of(folder)
    for layer in range(2):
        torch.testing.assert_close(
            alone.layers[layer]["down"].inputs_EKK, first.layers[layer]["down"].inputs_EKK
        )


def test_progress_is_told_for_every_block_twice(make_checkpoint: MakeCheckpoint) -> None:
    steps: list[int] = []
    with Checkpoint("tiny", make_checkpoint("tiny")) as checkpoint:
        collect(checkpoint, WINDOWS[:1], on_block=steps.append)
    assert steps == [1, 2, 3, 4]

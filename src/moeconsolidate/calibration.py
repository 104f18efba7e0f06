"""What each expert's errors cost, learned from text: streamed through a model a layer at a time.

For every expert the compiler wants to know which inputs it really sees and which of its outputs the
loss depends on. One forward sweep keeps each layer's input; one backward sweep recomputes a layer
with gradients of activations (never of weights), takes what it needs, and hands the gradient down.
Only one layer's weights are in memory; inputs and what was learned wait on disk.

The loss is taken against tokens drawn from the model's own predictions, which makes the squared
gradients an unbiased estimate of the Fisher information (as in natural-gradient work; labels from
the text would give the "empirical" Fisher instead).

Legend: W windows of T tokens, N tokens of a window batch, H hidden, I intermediate, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.importance import ExpertStatistics, SpooledLayers, Statistics, watched_experts
from moeconsolidate.spool import Spool
from moeruntime.families import ModelConfig
from moeruntime.families.decoder import layer_role
from moeruntime.models.layers import apply_rotary, rms_norm, rotary_tables
from moeruntime.models.moe import route

__all__ = ["StreamedLayer", "collect", "output_logits"]

BATCH_WINDOWS = 2
"""Windows recomputed with gradients at once."""


def collect(
    checkpoint: Checkpoint,
    windows_WT: Tensor,
    *,
    seed: int = 0,
    on_layer: Callable[[int], None] | None = None,
) -> Statistics:
    """Run calibration text through one model.

    Args:
        checkpoint: the model.
        windows_WT: int64 token ids; every window stands alone.
        seed: of the tokens drawn as labels.
        on_layer: called after each layer, forward and backward, with how many are done.
    """
    config = checkpoint.config
    spool = Spool()
    hidden_WTH = checkpoint.read_non_expert("embed_tokens").float()[windows_WT]
    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        if on_layer:
            on_layer(done)

    for idx in range(config.num_layers):
        spool.put(f"input-{idx}", hidden_WTH)
        layer = StreamedLayer(checkpoint, idx)
        hidden_WTH = layer.run(hidden_WTH)
        report()
    gradient_WTH = _output_gradient(checkpoint, hidden_WTH, seed)
    layers = SpooledLayers(spool, config.num_layers)
    routed = []
    for idx in reversed(range(config.num_layers)):
        layer = StreamedLayer(checkpoint, idx)
        taps = _Taps(config, watched_experts(idx, config.num_experts))
        below = []
        for x, gradient in zip(
            spool.get(f"input-{idx}").split(BATCH_WINDOWS),
            gradient_WTH.split(BATCH_WINDOWS),
            strict=True,
        ):
            x = x.requires_grad_()  # noqa: PLW2901 - a leaf of its own
            layer.forward(x, taps).backward(gradient)
            taps.count()
            assert x.grad is not None
            below.append(x.grad)
        gradient_WTH = torch.cat(below)
        spool.drop(f"input-{idx}")
        layers.put(idx, {"gate_up": taps.gate_up, "down": taps.down})
        routed.append(taps.num_routed_E)
        report()
    return Statistics(windows_WT.numel(), layers, torch.stack(routed[::-1]))


class _Taps:
    """Collects, during one layer's forward pass, what its backward pass will fill in."""

    def __init__(self, config: ModelConfig, watched: Sequence[int]) -> None:
        hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
        self.gate_up = ExpertStatistics.zeros(experts, 2 * inner, hidden, watched)
        self.down = ExpertStatistics.zeros(experts, hidden, inner, watched)
        self.num_routed_E = torch.zeros(experts, dtype=torch.int64)
        self._pending: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []

    def watch(
        self, expert: int, x_NH: Tensor, gate_up_NI: Tensor, inner_NI: Tensor, out_NH: Tensor
    ) -> None:
        """Remember an expert's inputs and outputs of this pass."""
        gate_up_NI.retain_grad()
        out_NH.retain_grad()
        self._pending.append((expert, x_NH, gate_up_NI, inner_NI, out_NH))

    def count(self) -> None:
        """Add what the backward pass found."""
        with torch.no_grad():
            for expert, x_NH, gate_up_NI, inner_NI, out_NH in self._pending:
                assert gate_up_NI.grad is not None and out_NH.grad is not None
                self.gate_up.add(expert, x_NH, gate_up_NI.grad)
                self.down.add(expert, inner_NI, out_NH.grad)
                self.num_routed_E[expert] += len(x_NH)
        self._pending.clear()


class StreamedLayer:
    """One decoder layer of one variant in float32, differentiable, without a cache."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        idx: int,
        *,
        experts: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Read layer `idx`; `experts`, gate_up and down of each, stand in for its own."""
        self._config = checkpoint.config
        self._roles = {
            name: checkpoint.read_non_expert(layer_role(idx, name)).float()
            for name in (
                "input_norm",
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "post_attention_norm",
                "router",
            )
        }
        self._experts = experts or self._read_experts(checkpoint, idx)

    def _read_experts(self, checkpoint: Checkpoint, idx: int) -> list[tuple[Tensor, Tensor]]:
        config, experts = self._config, []
        row_P = torch.empty(config.expert_numel, dtype=checkpoint.expert_dtype)
        split = 2 * config.intermediate_size * config.hidden_size
        for expert in range(config.num_experts):
            checkpoint.read_expert(idx, expert, out=row_P)
            gate_up_IH = row_P[:split].float().view(-1, config.hidden_size)
            experts.append((gate_up_IH, row_P[split:].float().view(config.hidden_size, -1)))
        return experts

    @torch.no_grad()
    def run(self, x_WTH: Tensor) -> Tensor:
        """The layer's output, a few windows at a time, without gradients."""
        return torch.cat([self.forward(x, None) for x in x_WTH.split(BATCH_WINDOWS)])

    def forward(self, x_WTH: Tensor, taps: _Taps | None) -> Tensor:
        """The layer's output for windows side by side."""
        x_WTH = x_WTH + self._attention(self._norm(x_WTH, "input_norm"))
        normed_NH = self._norm(x_WTH, "post_attention_norm").flatten(0, 1)
        return x_WTH + self._mixture(normed_NH, taps).view_as(x_WTH)

    @torch.no_grad()
    def expert_inputs(self, x_WTH: Tensor) -> Tensor:
        """What the layer hands its router and its experts, for the same windows."""
        attended_WTH = x_WTH + self._attention(self._norm(x_WTH, "input_norm"))
        return self._norm(attended_WTH, "post_attention_norm")

    def _norm(self, x_WTH: Tensor, role: str) -> Tensor:
        only = torch.zeros((), dtype=torch.int64)
        return rms_norm(x_WTH, self._roles[role][None], only, self._config.rms_norm_eps)

    def _attention(self, x_WTH: Tensor) -> Tensor:
        config, num_tokens = self._config, x_WTH.shape[1]
        rotary = rotary_tables(
            torch.arange(num_tokens), config.head_dim, config.rope_theta, torch.float32
        )

        def heads(role: str) -> Tensor:
            flat = F.linear(x_WTH, self._roles[role])
            return flat.view(*flat.shape[:2], -1, config.head_dim)

        query, key = apply_rotary(heads("q_proj"), *rotary), apply_rotary(heads("k_proj"), *rotary)
        window = config.sliding_window
        mask = None
        if window is not None and window < num_tokens:
            distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
            mask = (distance >= 0) & (distance < window)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            heads("v_proj").transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=config.num_heads != config.num_kv_heads,
        )
        merged_WTH: Tensor = attended.transpose(1, 2).flatten(2)
        return F.linear(merged_WTH, self._roles["o_proj"])

    def _mixture(self, x_NH: Tensor, taps: _Taps | None) -> Tensor:
        logits_NE = F.linear(x_NH, self._roles["router"])
        identity_NE = torch.arange(self._config.num_experts).expand_as(logits_NE)
        experts_NK, weights_NK = route(logits_NE, identity_NE, self._config.top_k)
        out_NH = torch.zeros_like(x_NH)
        for expert, (gate_up, down) in enumerate(self._experts):
            tokens, rank = (experts_NK == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            both = F.linear(x_NH[tokens], gate_up)
            gate, up = both.chunk(2, dim=-1)
            inner = F.silu(gate) * up
            out = F.linear(inner, down)
            if taps is not None:
                taps.watch(expert, x_NH[tokens], both, inner, out)
            out_NH = out_NH.index_add(0, tokens, out * weights_NK[tokens, rank, None])
        return out_NH


def output_logits(checkpoint: Checkpoint) -> Callable[[Tensor], Tensor]:
    """The end of a model: last layer's output [T, H] -> logits [T, V], in float32."""
    config = checkpoint.config
    norm_H = checkpoint.read_non_expert("final_norm").float()
    head = "embed_tokens" if config.tie_embeddings else "lm_head"
    head_VH = checkpoint.read_non_expert(head).float()
    only = torch.zeros((), dtype=torch.int64)

    def to_logits(hidden_TH: Tensor) -> Tensor:
        return F.linear(rms_norm(hidden_TH, norm_H[None], only, config.rms_norm_eps), head_VH)

    return to_logits


def _output_gradient(checkpoint: Checkpoint, hidden_WTH: Tensor, seed: int) -> Tensor:
    """Gradient of the summed loss at the last layer's output, a window at a time."""
    to_logits = output_logits(checkpoint)
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for window_TH in hidden_WTH:
        leaf_TH = window_TH.detach().requires_grad_()
        logits_TV = to_logits(leaf_TH)
        drawn_T = torch.multinomial(
            logits_TV.detach().softmax(dim=-1), 1, generator=generator
        ).squeeze(1)
        F.cross_entropy(logits_TV, drawn_T, reduction="sum").backward()
        assert leaf_TH.grad is not None
        gradients.append(leaf_TH.grad)
    return torch.stack(gradients)

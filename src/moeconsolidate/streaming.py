"""A model run a block at a time, in float32, differentiable and without a cache.

Only one block's weights are in memory. What runs are *windows*, which stand alone: int64 [W, T]
token ids; for an encoder-decoder [W, 2, T], what its encoder reads and what its decoder says, its
start token first, with PAD after the last token of each. Hidden states have the same shape and
H more: a block of either stack changes its own half and hands the other on.

Legend: W windows of T tokens, S the stack, N real tokens of all windows, H hidden, I intermediate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.parts import expert_parts
from moeruntime.families import DecoderConfig, EncoderDecoderConfig
from moeruntime.kernels import activate
from moeruntime.models.layers import apply_rotary, relative_buckets, rms_norm, rotary_tables
from moeruntime.models.moe import over_capacity, route, route_first

__all__ = [
    "BATCH_WINDOWS",
    "PAD",
    "ExpertTaps",
    "ExpertWork",
    "StreamedBlock",
    "embed",
    "output_logits",
    "predictions",
    "streamed_block",
]

BATCH_WINDOWS = 2
"""Windows run at once, with gradients or without."""

PAD = -1
"""In a window: no token here."""


@dataclass(frozen=True, slots=True)
class ExpertWork:
    """What one expert did for N tokens of some windows.

    Attributes:
        expert: which.
        tokens_N: their places among `StreamedBlock.own_rows`.
        weights_N: what its router gives it of each.
        x_NH: its inputs.
        gate_up_NI, out_NH: what its two products give.
        inner_NI: what stands between.
    """

    expert: int
    tokens_N: Tensor
    weights_N: Tensor
    x_NH: Tensor
    gate_up_NI: Tensor
    inner_NI: Tensor
    out_NH: Tensor


class ExpertTaps(Protocol):
    """Who watches experts at work."""

    def watch(self, work: ExpertWork) -> None:
        """See what an expert did, while it is done."""
        ...


def streamed_block(
    checkpoint: Checkpoint,
    number: int,
    *,
    experts: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> StreamedBlock:
    """Read a block; `experts`, gate_up and down of each, stand in for its own."""
    if isinstance(checkpoint.config, EncoderDecoderConfig):
        return _EncoderDecoderBlock(checkpoint, checkpoint.config, number, experts)
    assert isinstance(checkpoint.config, DecoderConfig)
    return _DecoderBlock(checkpoint, checkpoint.config, number, experts)


def embed(checkpoint: Checkpoint, windows: Tensor) -> Tensor:
    """Windows as the first block is given them, float32."""
    return checkpoint.read_non_expert("embed_tokens").float()[windows.clamp(min=0)]


def predictions(hidden: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Those hidden states of one window that predict something, and what comes after them.

    Returns:
        hidden_TH, and the token ids that follow, as far as they are known: a window of text goes on
        somehow, after an encoder-decoder's last token nothing comes.
    """
    if window.dim() == 1:
        return hidden, window[1:]
    ids_T = window[1][window[1] != PAD]
    return hidden[1, : len(ids_T) - 1], ids_T[1:]


def output_logits(checkpoint: Checkpoint) -> Callable[[Tensor], Tensor]:
    """The end of a model: last block's output [T, H] -> logits [T, V], in float32."""
    config = checkpoint.config
    norm_H = checkpoint.read_non_expert("final_norm").float()
    head = "embed_tokens" if config.tie_embeddings else "lm_head"
    head_VH = checkpoint.read_non_expert(head).float()
    only = torch.zeros((), dtype=torch.int64)
    scale = config.hidden_size**-0.5 if config.has_encoder and config.tie_embeddings else 1.0

    def to_logits(hidden_TH: Tensor) -> Tensor:
        normed_TH = rms_norm(hidden_TH, norm_H[None], only, config.rms_norm_eps)
        return F.linear(normed_TH * scale, head_VH)

    return to_logits


class StreamedBlock(ABC):
    """One block of one variant.

    Attributes:
        layer: its number among those with experts; None where it has none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        number: int,
        experts: Sequence[tuple[Tensor, Tensor]] | None,
    ) -> None:
        """Read what the block's roles name, and its experts."""
        config = checkpoint.config
        block = config.blocks[number]
        self.layer = config.layers.index(block) if block in config.layers else None
        self._activation, self._eps = config.activation, config.rms_norm_eps
        self._roles = {
            role.removeprefix(f"{block}."): checkpoint.read_non_expert(role).float()
            for role in config.non_expert_shapes()
            if role.startswith(f"{block}.")
        }
        self._experts = experts or self._read_experts(checkpoint)

    def _read_experts(self, checkpoint: Checkpoint) -> list[tuple[Tensor, Tensor]]:
        config, experts = checkpoint.config, []
        row_P = torch.empty(config.expert_numel, dtype=checkpoint.expert_dtype)
        for expert in range(config.num_experts if self.layer is not None else 0):
            checkpoint.read_expert(self.layer or 0, expert, out=row_P)
            gate_up, down = expert_parts(row_P.float(), config)
            experts.append((gate_up, down))
        return experts

    @torch.no_grad()
    def run(self, x: Tensor, windows: Tensor) -> Tensor:
        """The block's output, a few windows at a time, without gradients."""
        batches = zip(x.split(BATCH_WINDOWS), windows.split(BATCH_WINDOWS), strict=True)
        return torch.cat([self.forward(*batch, None) for batch in batches])

    @abstractmethod
    def forward(self, x: Tensor, windows: Tensor, taps: ExpertTaps | None) -> Tensor:
        """The block's output for windows side by side."""

    @abstractmethod
    def own_rows(self, hidden: Tensor, windows: Tensor) -> Tensor:
        """Of hidden states, those that the block's mixture adds to: [N, H]."""

    @abstractmethod
    def expert_inputs(self, x: Tensor, windows: Tensor) -> Tensor:
        """What the block hands its router and its experts for the real tokens: [N, H]."""

    def _norm(self, x: Tensor, role: str) -> Tensor:
        only = torch.zeros((), dtype=torch.int64)
        return rms_norm(x, self._roles[role][None], only, self._eps)

    def _heads(self, x_WTH: Tensor, role: str, head_dim: int) -> Tensor:
        """A projection as [W, heads, T, D]."""
        flat = F.linear(x_WTH, self._roles[role])
        return flat.view(*flat.shape[:2], -1, head_dim).transpose(1, 2)

    def _mix(
        self, x_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor, taps: ExpertTaps | None
    ) -> Tensor:
        """Each token's experts, added up by their weights."""
        out_NH = torch.zeros_like(x_NH)
        for expert, (gate_up, down) in enumerate(self._experts):
            tokens, rank = (experts_NK == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            first = F.linear(x_NH[tokens], gate_up)
            inner = activate(first, self._activation)
            out = F.linear(inner, down)
            if taps is not None:
                weights_N = weights_NK[tokens, rank]
                taps.watch(ExpertWork(expert, tokens, weights_N, x_NH[tokens], first, inner, out))
            out_NH = out_NH.index_add(0, tokens, out * weights_NK[tokens, rank, None])
        return out_NH


class _DecoderBlock(StreamedBlock):
    """A block of a decoder-only model."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        number: int,
        experts: Sequence[tuple[Tensor, Tensor]] | None,
    ) -> None:
        super().__init__(checkpoint, number, experts)
        self._config = config

    def forward(self, x: Tensor, windows: Tensor, taps: ExpertTaps | None) -> Tensor:
        x = x + self._attention(self._norm(x, "input_norm"))
        normed_NH = self._norm(x, "post_attention_norm").flatten(0, 1)
        logits_NE = F.linear(normed_NH, self._roles["router"])
        identity_NE = torch.arange(self._config.num_experts).expand_as(logits_NE)
        experts_NK, weights_NK = route(logits_NE, identity_NE, self._config.top_k)
        return x + self._mix(normed_NH, experts_NK, weights_NK, taps).view_as(x)

    def own_rows(self, hidden: Tensor, windows: Tensor) -> Tensor:
        return hidden.flatten(0, 1)

    @torch.no_grad()
    def expert_inputs(self, x: Tensor, windows: Tensor) -> Tensor:
        attended_WTH = x + self._attention(self._norm(x, "input_norm"))
        return self._norm(attended_WTH, "post_attention_norm").flatten(0, 1)

    def _attention(self, x_WTH: Tensor) -> Tensor:
        config, num_tokens = self._config, x_WTH.shape[1]
        # The tables are [T, 1, D]; heads come before tokens here.
        cos, sin = (
            table.transpose(0, 1)
            for table in rotary_tables(
                torch.arange(num_tokens), config.head_dim, config.rope_theta, torch.float32
            )
        )
        query, key, value = (self._heads(x_WTH, f"{one}_proj", config.head_dim) for one in "qkv")
        window = config.sliding_window
        mask = None
        if window is not None and window < num_tokens:
            distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
            mask = (distance >= 0) & (distance < window)
        attended = F.scaled_dot_product_attention(
            apply_rotary(query, cos, sin),
            apply_rotary(key, cos, sin),
            value,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=config.num_heads != config.num_kv_heads,
        )
        merged_WTH: Tensor = attended.transpose(1, 2).flatten(2)
        return F.linear(merged_WTH, self._roles["o_proj"])


class _EncoderDecoderBlock(StreamedBlock):
    """A block of either stack of an encoder-decoder."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EncoderDecoderConfig,
        number: int,
        experts: Sequence[tuple[Tensor, Tensor]] | None,
    ) -> None:
        super().__init__(checkpoint, number, experts)
        self._config = config
        self._stack = int(number >= config.encoder_blocks)
        first = (config.encoder, config.decoder)[self._stack][0]
        self._bias_BN = checkpoint.read_non_expert(f"{first}.position_bias").float()
        if self._stack:
            self._roles["encoded_norm"] = checkpoint.read_non_expert("encoder.final_norm").float()

    def forward(self, x: Tensor, windows: Tensor, taps: ExpertTaps | None) -> Tensor:
        real_WST = _running(windows)
        own_WTH = self._attended(x, real_WST)
        real_WT = real_WST[:, self._stack]
        normed_NH = self._norm(own_WTH, "post_attention_norm")[real_WT]
        if self.layer is None:
            inner_NI = activate(F.linear(normed_NH, self._roles["up_proj"]), self._activation)
            out_NH = F.linear(inner_NI, self._roles["down_proj"])
        else:
            out_NH = self._mixture(normed_NH, real_WT, taps)
        own_WTH = own_WTH.index_put((real_WT,), own_WTH[real_WT] + out_NH)
        halves = [x[:, 0], x[:, 1]]
        halves[self._stack] = own_WTH
        return torch.stack(halves, dim=1)

    def own_rows(self, hidden: Tensor, windows: Tensor) -> Tensor:
        return hidden[:, self._stack][_running(windows)[:, self._stack]]

    @torch.no_grad()
    def expert_inputs(self, x: Tensor, windows: Tensor) -> Tensor:
        real_WST = _running(windows)
        normed_WTH = self._norm(self._attended(x, real_WST), "post_attention_norm")
        return normed_WTH[real_WST[:, self._stack]]

    def _attended(self, x: Tensor, real_WST: Tensor) -> Tensor:
        """The block's half after attention to itself and, in the decoder, to the encoder."""
        own_WTH, num_tokens = x[:, self._stack], x.shape[2]
        place_T = torch.arange(num_tokens)
        ahead_TT = place_T - place_T[:, None]
        causal = bool(self._stack)
        bucket_TT = relative_buckets(
            ahead_TT,
            len(self._bias_BN),
            causal=causal,
            max_distance=self._config.max_distance,
        )
        bias_NTT = self._bias_BN[bucket_TT].permute(2, 0, 1)
        if causal:
            bias_NTT = bias_NTT.masked_fill(ahead_TT > 0, -torch.inf)
        normed_WTH = self._norm(own_WTH, "input_norm")
        keys_WT = real_WST[:, self._stack]
        own_WTH = own_WTH + self._attention(normed_WTH, normed_WTH, "", keys_WT, bias_NTT)
        if not self._stack:
            return own_WTH
        normed_WTH = self._norm(own_WTH, "cross_norm")
        encoded_WTH = self._norm(x[:, 0], "encoded_norm")
        return own_WTH + self._attention(normed_WTH, encoded_WTH, "cross_", real_WST[:, 0], None)

    def _attention(
        self, x_WTH: Tensor, of_WTH: Tensor, kind: str, keys_WT: Tensor, bias_NTT: Tensor | None
    ) -> Tensor:
        query, key, value = (
            self._heads(given, f"{kind}{one}_proj", self._config.head_dim)
            for one, given in zip("qkv", (x_WTH, of_WTH, of_WTH), strict=True)
        )
        mask_W11T = torch.zeros(keys_WT.shape).masked_fill(~keys_WT, -torch.inf)[:, None, None]
        mask = mask_W11T if bias_NTT is None else mask_W11T + bias_NTT
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
        merged_WTH: Tensor = attended.transpose(1, 2).flatten(2)
        return F.linear(merged_WTH, self._roles[f"{kind}o_proj"])

    def _mixture(self, x_NH: Tensor, real_WT: Tensor, taps: ExpertTaps | None) -> Tensor:
        config = self._config
        experts_N, weights_N = route_first(F.linear(x_NH, self._roles["router"]))
        full_N = over_capacity(
            experts_N.detach(),
            real_WT.nonzero()[:, 0],
            num_experts=config.num_experts,
            capacity=config.expert_capacity,
        )
        chosen_N = experts_N.masked_fill(full_N, config.num_experts)  # nobody
        return self._mix(x_NH, chosen_N[:, None], weights_N[:, None], taps)


def _running(windows_W2T: Tensor) -> Tensor:
    """Which tokens run: all real ones but the decoder's last, which is there to be predicted."""
    real_W2T = windows_W2T != PAD
    real_W2T[:, 1, :-1] &= real_W2T[:, 1, 1:].clone()
    real_W2T[:, 1, -1] = False
    return real_W2T

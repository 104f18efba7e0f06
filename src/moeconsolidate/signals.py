"""What experts are compared by, other than their weights as they stand.

Activations are what experts make of the same inputs, as HC-SMoE compares them (Chen et al. 2024,
https://arxiv.org/abs/2410.08589): NUM_INPUTS inputs a layer, in equal parts from every variant's
own stream of text, run through every expert of every variant, whatever its router would have
chosen. Unlike that paper, which averages over tokens, all outputs are kept and compared.

Neurons are an expert's weights seen as I samples of 3 H features, a gate_proj row, an up_proj row
and a down_proj column each; for similarities that want samples.

Legend: E (rows, one per variant and expert), P (weights of an expert), W windows of T tokens,
L layers, N inputs, H hidden, I intermediate, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.parts import expert_parts
from moeconsolidate.streaming import embed, streamed_block
from moeconsolidate.threads import single_threaded_torch
from moeruntime.families import ModelConfig
from moeruntime.kernels import activate

__all__ = ["expert_inputs", "expert_outputs", "neurons", "num_inputs"]

NUM_INPUTS = 512
"""Of a layer, from all variants together."""

NUM_WINDOWS = 8
"""Of each variant's text, spread evenly: what its part of the inputs is drawn from."""


def num_inputs(variant_idx: int, num_variants: int) -> int:
    """How many of a layer's inputs come from one variant: equally many, at least one."""
    return max(1, (NUM_INPUTS + num_variants - 1 - variant_idx) // num_variants)


@torch.no_grad()
def expert_inputs(
    checkpoint: Checkpoint,
    windows: Tensor,
    count: int,
    *,
    on_block: Callable[[int], None] | None = None,
) -> Tensor:
    """Run text through a variant, a block at a time, and keep what its experts are given.

    Args:
        checkpoint: the variant.
        windows: token ids, as `streaming` has them.
        count: inputs to keep of each layer, from places spread evenly over the text.
        on_block: called after each block with its index.

    Returns:
        float32 [L, count, H]: a layer's normed hidden states, before any router has chosen.
    """
    chosen = windows[_spread(len(windows), min(len(windows), NUM_WINDOWS))]
    hidden = embed(checkpoint, chosen)
    kept = []
    for number in range(len(checkpoint.config.blocks)):
        block = streamed_block(checkpoint, number)
        if block.layer is not None:
            inputs_NH = block.expert_inputs(hidden, chosen)
            kept.append(inputs_NH[_spread(len(inputs_NH), count)])
        hidden = block.run(hidden, chosen)
        if on_block:
            on_block(number)
    return torch.stack(kept)


def expert_outputs(experts_EP: Tensor, inputs_NH: Tensor, config: ModelConfig) -> Tensor:
    """What every expert makes of the same inputs: float32 [E, N, H], for any number of threads.

    Args:
        experts_EP: gate_proj | up_proj | down_proj, flattened.
        inputs_NH: float32.
        config: the experts' architecture.
    """
    outputs_ENH = torch.empty(len(experts_EP), *inputs_NH.shape)

    @torch.no_grad()
    def run(row: int) -> None:
        gate_up, down = expert_parts(experts_EP[row], config)
        inner_NI = activate(F.linear(inputs_NH, gate_up.float()), config.activation)
        outputs_ENH[row] = F.linear(inner_NI, down.float())

    with single_threaded_torch() as num_threads, ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(run, range(len(experts_EP))))
    return outputs_ENH


def neurons(expert_P: Tensor, config: ModelConfig) -> Tensor:
    """An expert's weights as samples [I, F], one a neuron, in the expert's dtype.

    F is H for each of an expert's matrices: 3 H with a gate, 2 H without.
    """
    gate_up, down_HI = expert_parts(expert_P, config)
    return torch.cat([*gate_up.split(config.intermediate_size), down_HI.T], dim=1)


def _spread(total: int, count: int) -> Tensor:
    """`count` indices below `total`, as far apart as can be; some repeat if there are fewer."""
    return (2 * torch.arange(count) + 1) * total // (2 * count)

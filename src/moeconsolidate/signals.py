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

from moeconsolidate.calibration import StreamedLayer
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.parts import expert_parts
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
    windows_WT: Tensor,
    count: int,
    *,
    on_layer: Callable[[int], None] | None = None,
) -> Tensor:
    """Run text through a variant, a layer at a time, and keep what its experts are given.

    Args:
        checkpoint: the variant.
        windows_WT: int64 token ids; every window stands alone.
        count: inputs to keep of each layer, from places spread evenly over the text.
        on_layer: called after each layer with its index.

    Returns:
        float32 [L, count, H]: a layer's normed hidden states, before any router has chosen.
    """
    chosen_WT = windows_WT[_spread(len(windows_WT), min(len(windows_WT), NUM_WINDOWS))]
    places = _spread(chosen_WT.numel(), count)
    hidden_WTH = checkpoint.read_non_expert("embed_tokens").float()[chosen_WT]
    kept = []
    for idx in range(checkpoint.config.num_layers):
        layer = StreamedLayer(checkpoint, idx)
        kept.append(layer.expert_inputs(hidden_WTH).flatten(0, 1)[places])
        hidden_WTH = layer.run(hidden_WTH)
        if on_layer:
            on_layer(idx)
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

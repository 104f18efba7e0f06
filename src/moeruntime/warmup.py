"""What an engine does once, done before anybody waits for it."""

from __future__ import annotations

from moeruntime.engine import Engine
from moeruntime.kernels.nested_fast import most_pairs
from moeruntime.kv_cache import BLOCK_TOKENS
from moeruntime.models.step_buffers import FEW_PAIRS
from moeruntime.request import Request, SamplingParams

__all__ = ["warm_up"]


def warm_up(engine: Engine) -> None:
    """Bring a token out of every variant; on CUDA compile the kernels and capture the graphs, too.

    Kernels and graphs are otherwise made when a step first needs them, which takes up to seconds
    while its requests wait. The engine must be idle, and is so afterwards.
    """
    names = engine.source.manifest.variant_names
    once = SamplingParams(max_tokens=1)
    engine.generate([Request(name, [0], once) for name in names])
    if engine.graphs is None:
        return
    engine.graphs.capture_all()
    config = engine.source.manifest.config
    # Whose prompts are asked for as well, so that steps of few tokens are run without a graph, too.
    sampled = SamplingParams(max_tokens=2, temperature=1.0, seed=0, logprobs=1, prompt_logprobs=1)
    few = 2
    room = min(config.max_context, engine.memory.num_blocks * BLOCK_TOKENS) - few
    # How many tokens a step has decides which kernels serve its experts, and how many variants.
    # None is for less than 1.5 times as many tokens as its fewest, so these meet them all.
    pairs = most_pairs(engine.device, config.num_experts), FEW_PAIRS
    limits = [one // config.top_k for one in pairs]
    lengths = {first << k for first in (few, few + 1) for k in range(max(limits).bit_length())}
    lengths |= {limit + more for limit in limits for more in (0, 1)}
    most = max(limits) + 1
    for length in sorted({min(length, room) for length in lengths if length <= most}):
        for some in dict.fromkeys((names, names[:3], names[:1])):
            if len(some) == 1 or len(some) * length <= most:
                engine.generate([Request(name, [0] * length, sampled) for name in some])

"""What an engine does once, done before anybody waits for it."""

from __future__ import annotations

from moeruntime.engine import Engine
from moeruntime.kernels.nested_fast import most_pairs
from moeruntime.kv_cache import BLOCK_TOKENS
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
    # Whose prompts are asked for as well: only then a step of few tokens is run without a graph.
    sampled = SamplingParams(max_tokens=2, temperature=1.0, seed=0, logprobs=1, prompt_logprobs=1)
    few = 2
    room = min(config.max_context, engine.memory.num_blocks * BLOCK_TOKENS) - few
    most = most_pairs(engine.device) // config.top_k  # and for one more codes are decoded
    # How many tokens a step has decides which kernels serve its experts; none is for less than
    # twice as many as its fewest, so doubling meets them all.
    lengths = {few << k for k in range((most // few).bit_length())} | {most, most + 1}
    for length in sorted({min(length, room) for length in lengths}):
        for some in dict.fromkeys((names, names[:1])):  # and how many variants it has
            engine.generate([Request(name, [0] * length, sampled) for name in some])

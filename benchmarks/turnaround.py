"""Turnaround of several variants on one GPU: moec against two partitions and the published scheme.

The paper's headline (arXiv 2505.06481) is turnaround against two MIG instances. This measures what
steps, swaps and expert copies take on this device, then replays long Poisson arrivals through the
real scheduler on simulated time, and a short one through the real engine to check the simulation.

- moec: all variants in one engine, mixed batches, fair sharing.
- (a) partitions: two halves of the device, emulated by green contexts of 64 and 60 SMs with half
  the memory each. Experts that do not fit are copied from pinned host memory per use. Variants are
  divided among the halves. Each half batches as moec does.
- (b) published: one variant active, one request at a time in order of arrival; another variant's
  weights are exchanged by unpinned copies out and in. Experts are shared, and all are resident.
- (c) alone: one model with the whole device, at the same total rate.

What the emulation flatters, in (a): a half is measured while the other is idle, so neither memory
bandwidth nor the bus is shared; its kernels are moec's, with moec's batching; a copy's time is the
bus's alone, as if it cost nothing to wait for; experts that were copied for one step are free for
all of its tokens. In (b): its steps are moec's. What it harms, in (a): real partitions need not be
equal in memory to 1/2, a cache of recently used experts would save some copies, and copies of a
real system might overlap with the products of other experts; `overlapped` in the result is (a) if
all copies of a step ran beside all of its products.

Run: python benchmarks/turnaround.py --synthetic mixtral-8x7b            (one H200, 6-8 minutes)
     python benchmarks/turnaround.py --synthetic mixtral-tiny --quick    (a CPU, to try it)
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from _common import print_json
from _simulation import Arrival, Clients, Clock, Served, percentile, poisson, simulate
from activation import published_ms

from moeruntime import Engine, Request, SamplingParams
from moeruntime.bench.machine import device_name, synchronize
from moeruntime.hostmemory import HostMemory
from moeruntime.kernels import TokenGroup
from moeruntime.kv_cache import blocks_for
from moeruntime.loading import resolve_device
from moeruntime.models import Batch
from moeruntime.models.batch import Span
from moeruntime.qos import FairShare, Targets
from moeruntime.synthetic import SyntheticSource
from moeruntime.waiting import ArrivalOrder
from moeruntime.warmup import warm_up

SMS = (64, 60)
PARTITION_RESERVE_BYTES = 4 * 2**30  # of a half's memory: cache, context, workspaces
MAX_SEQUENCES = 64
CACHE_BYTES = 10 * 2**30
TARGETS = Targets(ttft_s=0.5, tpot_s=0.05)
NUM_PROMPT, NUM_NEW = 512, 128


# -- what things take ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Seconds on this device.

    Attributes:
        decode_s: sequences -> a step, of one variant and of all mixed.
        prompt_s: prompt tokens -> a step with them alone.
        beside_s: what a step with a prompt takes longer for each sequence that decodes in it.
        swap_s: the published exchange of a variant.
        copy_s: of one expert from pinned memory; and of one while another is copied, too.
        slower: how much longer a decode step takes in each partition; 1 where it is not.
    """

    decode_s: dict[int, tuple[float, float]]
    prompt_s: dict[int, float]
    beside_s: float
    swap_s: float
    copy_s: tuple[float, float]
    slower: tuple[float, float]

    def step_s(self, num_decodes: int, num_prompt_tokens: int, num_variants: int) -> float:
        mixed = num_variants > 1
        table = {batch: both[mixed] for batch, both in self.decode_s.items()}
        if not num_prompt_tokens:
            return _between(table, num_decodes)
        return _between(self.prompt_s, num_prompt_tokens) + self.beside_s * num_decodes


def _between(table: dict[int, float], at: float) -> float:
    """Linear between measured points, and beyond the last by its slope; flat before the first."""
    points = sorted(table.items())
    if at <= points[0][0] or len(points) == 1:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if at <= x1 or x1 == points[-1][0]:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    raise AssertionError


def measure(engine: Engine, *, quick: bool) -> Costs:
    batches = (1, 4, 8) if quick else (1, 2, 4, 8, 16, 32, 48)
    prompts = (32, 64, 128) if quick else (128, 512, 1024, 2048)
    names = engine.source.manifest.variant_names
    decode_s = {}
    for batch in batches:
        single = _decode_s(engine, names[:1], batch)
        decode_s[batch] = (single, _decode_s(engine, names, batch) if batch > 1 else single)
        print(f"decode at {batch}: {single * 1e3:.2f} ms, mixed {decode_s[batch][1] * 1e3:.2f} ms")
    prompt_s = {}
    for tokens in prompts:
        prompt_s[tokens] = statistics.median(_prompt_s(engine, tokens, 0) for _ in range(4))
        print(f"prompt of {tokens}: {prompt_s[tokens] * 1e3:.2f} ms")
    middle, beside = prompts[1], batches[-2]
    with_decodes = statistics.median(_prompt_s(engine, middle, beside) for _ in range(3))
    beside_s = max(0.0, (with_decodes - prompt_s[middle]) / beside)
    swap_s = published_ms(engine, 2) / 1e3 if engine.device.type == "cuda" else 0.1
    return Costs(
        decode_s, prompt_s, beside_s, swap_s, _copy_s(engine), _slower(engine, batches[:4])
    )


def _tokens(engine: Engine, count: int) -> list[int]:
    vocab_size = engine.source.manifest.config.vocab_size
    return [random.randrange(vocab_size) for _ in range(count)]


def _decode_s(engine: Engine, names: Sequence[str], batch: int) -> float:
    """A step in which so many sequences decode, through the engine; median of 24."""
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    length = min(256, engine.source.manifest.config.max_context - 80)
    for number in range(batch):
        engine.submit(Request(names[number % len(names)], _tokens(engine, length), params))
    times_s: list[float] = []
    while not engine.scheduler.idle:
        start_s = time.perf_counter()
        count = len(engine.step())
        if count == batch and not len(engine.scheduler.waiting):
            times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s[8:32])


def _prompt_s(engine: Engine, tokens: int, beside: int) -> float:
    """From submitting a prompt to its token, beside sequences that decode."""
    name = engine.source.manifest.variant_names[0]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    for _ in range(beside):
        engine.submit(Request(name, _tokens(engine, 256), params))
    for _ in range(12 if beside else 0):
        engine.step()
    synchronize(engine.device)
    start_s = time.perf_counter()
    number = engine.submit(Request(name, _tokens(engine, tokens), SamplingParams(max_tokens=1)))
    while all(delta.request_id != number for delta in engine.step()):
        pass
    taken_s = time.perf_counter() - start_s
    while not engine.scheduler.idle:
        engine.step()
    return taken_s


def _copy_s(engine: Engine) -> tuple[float, float]:
    """One expert from pinned memory, alone and beside another."""
    config = engine.source.manifest.config
    num_bytes = 3 * config.hidden_size * config.intermediate_size * 2
    hosts = [HostMemory(num_bytes) for _ in range(2)]
    targets = [torch.empty(num_bytes, dtype=torch.uint8, device=engine.device) for _ in range(2)]
    if engine.device.type != "cuda":
        start_s = time.perf_counter()
        targets[0].copy_(hosts[0].data)
        return (time.perf_counter() - start_s,) * 2
    streams = [torch.cuda.Stream() for _ in range(2)]
    for host in hosts:
        host.pin()
    found = []
    for count in (1, 2):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        for _ in range(8):
            for stream, host, target in list(zip(streams, hosts, targets, strict=True))[:count]:
                with torch.cuda.stream(stream):
                    target.copy_(host.data, non_blocking=True)
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start_s) / 8)
    return found[0], found[1]


def _slower(engine: Engine, batches: Sequence[int]) -> tuple[float, float]:
    """How much longer a decode takes on a part of the SMs: mean over sizes of batch.

    Launched kernel by kernel, in and outside of a partition: where launching is what takes the
    time, that hides what a partition costs.
    """
    if engine.device.type != "cuda":
        return 1.0, 1.0
    from torch.cuda.green_contexts import GreenContext

    whole = [_eager_s(engine, batch) for batch in batches]
    found = []
    for num_sms in SMS:
        try:
            context = GreenContext.create(num_sms=num_sms, device_id=engine.device.index or 0)
        except RuntimeError as problem:
            print(f"no partition of {num_sms} SMs here, none is assumed: {problem}")
            return 1.0, 1.0
        context.set_context()
        try:
            part = [_eager_s(engine, batch) for batch in batches]
        finally:
            context.pop_context()
        print(
            f"{num_sms} SMs: {[round(one * 1e3, 2) for one in part]} ms, "
            f"all: {[round(one * 1e3, 2) for one in whole]} ms"
        )
        ratios = [max(1.0, one / other) for one, other in zip(part, whole, strict=True)]
        found.append(statistics.mean(ratios))
    return found[0], found[1]


def _eager_s(engine: Engine, batch: int) -> float:
    """A decode step of one variant, launched kernel by kernel."""
    name = engine.source.manifest.variant_names[0]
    assert engine.residency.admit(name)
    slot = engine.residency.slot(name)
    engine.residency.release(name)
    each = blocks_for(257)
    spans = [Span(slot, 0, [1], 256, range(i * each, (i + 1) * each)) for i in range(batch)]
    laid_out = Batch.build(spans, engine.device)

    def run() -> None:
        hidden_TH = engine.model.forward(laid_out)
        engine.model.logits(hidden_TH, [TokenGroup(slot, 0, batch)])

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    for _ in range(10):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start_s) / 10


# -- the contestants -------------------------------------------------------------------------------


def run_moec(costs: Costs, arrivals: Sequence[Arrival], names: Sequence[str]) -> list[Served]:
    clock = Clock()
    waiting = FairShare(dict.fromkeys(names, TARGETS), clock=clock)
    return simulate(
        arrivals, costs.step_s, clock=clock, waiting=waiting, max_sequences=MAX_SEQUENCES
    )


def run_alone(costs: Costs, arrivals: Sequence[Arrival]) -> list[Served]:
    """The same requests, all of one model."""
    same = [Arrival(one.at_s, "one", one.num_prompt, one.num_new) for one in arrivals]
    return run_moec(costs, same, ["one"])


def run_partitions(
    engine: Engine,
    costs: Costs,
    arrivals: Sequence[Arrival],
    names: Sequence[str],
    half_bytes: float,
    *,
    overlapped: bool = False,
) -> list[Served]:
    """Each half serves every other variant."""
    config = engine.source.manifest.config
    expert_bytes = 3 * config.hidden_size * config.intermediate_size * 2
    own_bytes = 2 * sum(torch.Size(shape).numel() for shape in config.non_expert_shapes().values())
    served = []
    for part in range(2):
        mine = names[part::2]
        if not mine:
            continue
        room = half_bytes - PARTITION_RESERVE_BYTES - len(mine) * own_bytes
        per_layer = min(config.num_experts, room / expert_bytes / config.num_layers / len(mine))
        missing = config.num_experts - per_layer
        slower = costs.slower[part]

        def step_s(
            decodes: int, tokens: int, variants: int, missing: float = missing, slow: float = slower
        ) -> float:
            each = (decodes + tokens) / variants
            met = 1.0 - (1.0 - config.top_k / config.num_experts) ** each
            copies_s = costs.copy_s[0] * missing * met * variants * config.num_layers
            products_s = slow * costs.step_s(decodes, tokens, variants)
            return max(copies_s, products_s) if overlapped else copies_s + products_s

        clock = Clock()
        waiting = FairShare(dict.fromkeys(mine, TARGETS), clock=clock)
        here = [one for one in arrivals if one.variant in mine]
        served += simulate(here, step_s, clock=clock, waiting=waiting, max_sequences=MAX_SEQUENCES)
    return served


def run_published(costs: Costs, arrivals: Sequence[Arrival]) -> list[Served]:
    """One request at a time, in order of arrival."""
    free_s, active = 0.0, ""
    served = []
    for one in sorted(arrivals):
        start_s = max(free_s, one.at_s)
        swap_s = 0.0 if one.variant == active else costs.swap_s
        first_s = start_s + swap_s + costs.step_s(0, one.num_prompt, 1)
        free_s = first_s + (one.num_new - 1) * costs.step_s(1, 0, 1)
        active = one.variant
        served.append(Served(one, start_s, first_s, free_s))
    return served


def summary(served: Sequence[Served]) -> dict[str, float]:
    """Seconds, but for the rate of tokens."""
    tpots = [one.tpot_s for one in served if one.tpot_s is not None]
    values = {
        "ttft": [one.ttft_s for one in served],
        "tpot": tpots,
        "turnaround": [one.turnaround_s for one in served],
        "service": [one.service_s for one in served],
    }
    found = {}
    for name, all_s in values.items():
        found[f"{name}_mean_s"] = statistics.mean(all_s)
        found[f"{name}_p99_s"] = percentile(all_s, 0.99)
    span_s = max(one.last_s for one in served) - min(one.arrival.at_s for one in served)
    found["tokens_per_s"] = sum(one.arrival.num_new for one in served) / span_s
    return found


# -- for real --------------------------------------------------------------------------------------


def replay(
    engine: Engine, arrivals: Sequence[Arrival], clients: Sequence[Clients] = ()
) -> list[Served]:
    """Arrivals through the engine, at their time; clients send their next when answered."""
    names = engine.source.manifest.variant_names
    waiting = FairShare(dict.fromkeys(names, TARGETS))
    waiting.bind(MAX_SEQUENCES, engine.memory.num_blocks)
    assert engine.scheduler.idle
    engine.scheduler.waiting = waiting
    loops = {one.variant: one for one in clients}
    coming = sorted(
        [*arrivals]
        + [
            Arrival(one.from_s, one.variant, one.num_prompt, one.num_new)
            for one in clients
            for _ in range(one.count)
        ]
    )
    alive: dict[int, tuple[Arrival, list[float]]] = {}
    served: list[Served] = []
    start_s = time.perf_counter()
    while coming or alive:
        engine.await_turn()
        now_s = time.perf_counter() - start_s
        while coming and coming[0].at_s <= now_s:
            one = coming.pop(0)
            params = SamplingParams(max_tokens=one.num_new, ignore_eos=True)
            request = Request(one.variant, _tokens(engine, one.num_prompt), params)
            alive[engine.submit(request)] = (one, [])
        if not alive:
            time.sleep(min(0.001, max(0.0, coming[0].at_s - now_s)))
            continue
        before_s = time.perf_counter()
        deltas = engine.step()
        after_s = time.perf_counter()
        waiting.observe(after_s - before_s)
        for delta in deltas:
            one, times_s = alive[delta.request_id]
            times_s.append(after_s - start_s)
            if delta.output is not None:
                del alive[delta.request_id]
                served.append(Served(one, one.at_s, times_s[0], times_s[-1]))
                loop = loops.get(one.variant)
                if loop is not None and times_s[-1] < loop.until_s:
                    again = Arrival(times_s[-1], one.variant, one.num_prompt, one.num_new)
                    coming.insert(0, again)
    engine.scheduler.waiting = ArrivalOrder()
    engine.scheduler.waiting.bind(MAX_SEQUENCES, engine.memory.num_blocks)
    return served


def check_simulation(
    engine: Engine, costs: Costs, *, rate_per_s: float, seconds: float, sizes: tuple[int, int]
) -> dict[str, Any]:
    names = engine.source.manifest.variant_names
    fixed = {"num_prompt": (sizes[0],) * 2, "num_new": (sizes[1],) * 2}
    arrivals = poisson(names, rate_per_s, seconds, seed=5, **fixed)
    real, simulated = summary(replay(engine, arrivals)), summary(run_moec(costs, arrivals, names))
    return {"rate_per_s": rate_per_s, "real": real, "simulated": simulated}


def flood(engine: Engine, *, seconds: float, sizes: tuple[int, int]) -> dict[str, float]:
    """The others' TTFT beside no, 8 and 100 clients of the last variant, for real."""
    *others, flooder = engine.source.manifest.variant_names
    lengths = {"num_prompt": (sizes[0] // 8, sizes[0]), "num_new": (sizes[1] // 8, sizes[1])}
    arrivals = poisson(others, 2.0, seconds, seed=6, **lengths)
    found = {}
    for count in (0, 8, 100):
        clients = [Clients(flooder, count, sizes[0] // 2, sizes[1] // 2, 5.0, seconds)]
        served = replay(engine, arrivals, clients)
        ttfts_s = [
            one.ttft_s
            for one in served
            if one.arrival.variant != flooder and one.arrival.at_s > 7.0  # the flood is under way
        ]
        found[f"mean_ttft_s_beside_{count}"] = statistics.mean(ttfts_s)
        found[f"p99_ttft_s_beside_{count}"] = percentile(ttfts_s, 0.99)
    found["ratio"] = found["p99_ttft_s_beside_100"] / found["p99_ttft_s_beside_8"]
    return found


def compare(
    engine: Engine,
    costs: Costs,
    num_variants: int,
    rates_per_s: Sequence[float],
    half_bytes: float,
    sizes: tuple[int, int],
    num_requests: int,
) -> list[dict[str, Any]]:
    """A row for each rate a model; fewer requests where each is served by itself anyway."""
    rows = []
    names = [f"v{idx}" for idx in range(num_variants)]
    fixed = {"num_prompt": (sizes[0],) * 2, "num_new": (sizes[1],) * 2}
    for rate in rates_per_s:
        count = num_requests if rate >= 0.5 else num_requests // 3
        until_s = count / rate / num_variants
        arrivals = poisson(names, rate, until_s, seed=7, **fixed)
        contestants: dict[str, Callable[[], list[Served]]] = {
            "moec": lambda a=arrivals: run_moec(costs, a, names),
            "partitions": lambda a=arrivals: run_partitions(engine, costs, a, names, half_bytes),
            "partitions_overlapped": lambda a=arrivals: run_partitions(
                engine, costs, a, names, half_bytes, overlapped=True
            ),
            "published": lambda a=arrivals: run_published(costs, a),
            "alone": lambda a=arrivals: run_alone(costs, a),
        }
        row: dict[str, Any] = {"variants": num_variants, "rate_per_s": rate}
        row |= {name: summary(run()) for name, run in contestants.items()}
        moec, parts = row["moec"], row["partitions"]
        row["below_partitions"] = 1 - moec["turnaround_mean_s"] / parts["turnaround_mean_s"]
        row["below_partitions_service"] = 1 - moec["service_mean_s"] / parts["service_mean_s"]
        row["of_alone_tokens"] = moec["tokens_per_s"] / row["alone"]["tokens_per_s"]
        rows.append(row)
        print(f"\n{num_variants} variants, {rate:g} requests/s each")
        for name in contestants:
            one = row[name]
            print(
                f"  {name:22s} TTFT {one['ttft_mean_s']:8.3f} / {one['ttft_p99_s']:8.3f}"
                f"  TPOT {one['tpot_mean_s'] * 1e3:7.1f} / {one['tpot_p99_s'] * 1e3:7.1f} ms"
                f"  turnaround {one['turnaround_mean_s']:8.2f} / {one['turnaround_p99_s']:8.2f}"
                f"  without queue {one['service_mean_s']:7.2f}  {one['tokens_per_s']:7.1f} tokens/s"
            )
        print(
            f"  moec: {row['below_partitions']:.1%} below partitions "
            f"({row['below_partitions_service']:.1%} without queueing), "
            f"{row['of_alone_tokens']:.1%} of one model's tokens"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Turnaround against partitions of the device.")
    parser.add_argument("--synthetic", default="mixtral-8x7b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="short, to try it without a GPU")
    parser.add_argument("--variants", type=int, nargs="+", default=[2, 4], help="of each engine")
    arguments = parser.parse_args()
    random.seed(1)
    quick = arguments.quick
    device = resolve_device(arguments.device)
    sizes = (64, 16) if quick else (NUM_PROMPT, NUM_NEW)
    rates = (0.08, 4.0) if quick else (0.005, 0.02, 0.08, 0.25, 1.0, 4.0, 8.0, 16.0, 32.0)
    result: dict[str, Any] = {"benchmark": "turnaround", "device": device_name(device), "rows": []}
    if device.type == "cuda":
        half_bytes = torch.cuda.get_device_properties(device).total_memory / 2
    else:
        half_bytes = PARTITION_RESERVE_BYTES + 1e6  # most experts of a small model do not fit
    for num_variants in arguments.variants:
        source = SyntheticSource(arguments.synthetic, num_variants=num_variants)
        start_s = time.perf_counter()
        with Engine(
            source,
            device=arguments.device,
            max_sequences=MAX_SEQUENCES,
            cache_bytes=CACHE_BYTES if device.type == "cuda" else None,
            prefix_cache=False,
        ) as engine:
            print(f"{num_variants} variants loaded in {time.perf_counter() - start_s:.0f} s")
            warm_up(engine)
            costs = measure(engine, quick=quick)
            print(f"swap {costs.swap_s:.3f} s, expert {costs.copy_s}, partitions {costs.slower}")
            result[f"costs_{num_variants}"] = {
                "decode_s": costs.decode_s,
                "prompt_s": costs.prompt_s,
                "beside_s": costs.beside_s,
                "swap_s": costs.swap_s,
                "expert_copy_s": costs.copy_s,
                "slower_in_partitions": costs.slower,
            }
            result["rows"] += compare(
                engine, costs, num_variants, rates, half_bytes, sizes, 40 if quick else 400
            )
            seconds = 3.0 if quick else 40.0
            checked = check_simulation(engine, costs, rate_per_s=1.0, seconds=seconds, sizes=sizes)
            result[f"check_{num_variants}"] = checked
            for what in ("ttft_mean_s", "tpot_mean_s", "turnaround_mean_s"):
                real, simulated = checked["real"][what], checked["simulated"][what]
                print(f"real {what} {real:.4f}, simulated {simulated:.4f}")
            if num_variants == max(arguments.variants):
                result["flood"] = flood(engine, seconds=8.0 if quick else 60.0, sizes=sizes)
                print(f"flood: {result['flood']}")
        del engine, source
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print_json(result)


if __name__ == "__main__":
    main()

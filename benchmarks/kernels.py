"""The decode kernels at the sizes of Mixtral-8x7B: right, and how near to the read bandwidth.

Every kernel is first compared with float32 products on fresh random inputs, over poisoned outputs.
Then each way of cutting the work is timed, over weights far larger than the cache.

Run: python benchmarks/kernels.py [--quick]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import asdict

import torch
from _common import print_json
from _gpu import graph_s, read_bandwidth
from torch import Tensor

from moeruntime.kernels import experts, projections
from moeruntime.kernels.norms import FaceLists
from moeruntime.kernels.projections import Shape, tile_rows

H, I, E, K = 4096, 14336, 8, 2
DEVICE = torch.device("cuda")


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


def routed(num_tokens: int, num_faces: int) -> FaceLists:
    """Each token to K faces at random."""
    faces_TK = torch.rand(num_tokens, num_faces, device=DEVICE).topk(K, dim=-1).indices
    weights_TK = torch.rand(num_tokens, K, device=DEVICE)
    return FaceLists.of(faces_TK, weights_TK, num_faces)


def check_experts(num_tokens: int, shape: Shape, parts: int) -> float:
    """Largest relative error of gate_up and down."""
    gate_up = torch.randn(E, 2 * I, H, device=DEVICE, dtype=torch.bfloat16) / 64
    down = torch.randn(E, H, I, device=DEVICE, dtype=torch.bfloat16) / 64
    x = torch.randn(num_tokens, H, device=DEVICE, dtype=torch.bfloat16)
    lists = routed(num_tokens, E)
    inner = torch.full((num_tokens * K, I), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    out = torch.full((num_tokens * K, parts, H), torch.nan, device=DEVICE)
    experts.gate_up(x, gate_up, lists, 0, shape, out_MI=inner)
    cut = Shape(shape.rows, shape.step, shape.tokens, parts, shape.warps, shape.stages)
    experts.down(inner, down, lists, 0, cut, out_MSH=out)
    worst = 0.0
    for face in range(E):
        count = int(lists.counts_LF[0, face])
        pairs = lists.pairs_LFC[0, face, :count].long()
        both = x[pairs // K].float() @ gate_up[face].float().T
        expected = torch.nn.functional.silu(both[:, :I]) * both[:, I:]
        if count:
            worst = max(worst, error(inner[pairs], expected))
            weights = lists.weights_TK.flatten()[pairs, None]
            expected = inner[pairs].float() @ down[face].float().T * weights
            worst = max(worst, error(out[pairs].sum(1), expected))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}: read {bandwidth / 1e12:.3f} TB/s")
    results: list[dict[str, object]] = []
    for tokens in (1, 7, 32, 128):
        print(f"experts, {tokens} tokens: error {check_experts(tokens, Shape(32, 128, 16), 2):.2e}")
    gate_up, down = (
        [torch.randn(E, *shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
        for shape in ((2 * I, H), (H, I))
    )
    dense = torch.randn(8, 6144, H, device=DEVICE, dtype=torch.bfloat16)
    cuts = ((4, 3), (4, 4), (4, 5), (8, 4)) if not arguments.quick else ((4, 4),)

    def timed(
        entry: dict[str, object], num_bytes: int, calls: int, work: Callable[[], None]
    ) -> None:
        try:
            seconds = graph_s(work) / calls
        except Exception as problem:  # more shared memory than there is
            if "out of resource" not in str(problem):
                raise
            return
        rate = num_bytes / seconds / bandwidth
        results.append(entry | {"us": seconds * 1e6, "of_read": rate})

    for tokens in (1, 8, 64, 128):
        x = torch.randn(tokens, H, device=DEVICE, dtype=torch.bfloat16)
        inner = torch.randn(tokens * K, I, device=DEVICE, dtype=torch.bfloat16)
        lists = routed(tokens, E)
        active = int((lists.counts_LF[0] > 0).sum())
        tiles = (16,) if tokens <= 8 else (16, 32) if tokens <= 64 else (32, 64)
        for rows, step, (warps, stages), tile in itertools.product(
            (16, 32, 64), (64, 128, 256), cuts, tiles
        ):
            if rows * step * stages * 4 > 230_000:
                continue
            for name, weights, parts in (
                ("gate_up", gate_up, 1), ("down", down, 1), ("down", down, 2), ("down", down, 4)
            ):  # fmt: skip
                shape = Shape(rows, step, tile, parts, warps, stages)
                out = torch.empty(tokens * K, parts, H, device=DEVICE)

                def work() -> None:
                    for one in weights:
                        if name == "gate_up":
                            experts.gate_up(x, one, lists, 0, shape, out_MI=inner)
                        else:
                            experts.down(inner, one, lists, 0, shape, out_MSH=out)

                entry = asdict(shape) | {"kernel": name, "batch": tokens}
                timed(entry, active * weights[0][0].nbytes, len(weights), work)
        tile = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
        for rows, step, (warps, stages), parts in itertools.product(
            (16, 32, 64), (128, 256), cuts, (1, 2, 4)
        ):
            shape = Shape(rows, step, tile, parts, warps, stages)
            table = tile_rows([(0, 0, tokens)], tile, -(-tokens // tile))
            tile_table = torch.tensor(table, dtype=torch.int32, device=DEVICE)
            out = torch.empty(tokens, parts, 6144, device=DEVICE)

            def work() -> None:
                for one in dense:
                    projections.project(x, one[None], tile_table, shape, out=out)

            entry = asdict(shape) | {"kernel": "project", "batch": tokens}
            timed(entry, dense[0].nbytes, len(dense), work)
    for kernel, tokens in dict.fromkeys((str(r["kernel"]), r["batch"]) for r in results):
        rows_of = [r for r in results if (r["kernel"], r["batch"]) == (kernel, tokens)]
        rows_of.sort(key=lambda r: float(str(r["us"])))
        for r in rows_of[:4]:
            print(
                f"{kernel:8s} batch {tokens:<4} rows {r['rows']} step {r['step']} tokens "
                f"{r['tokens']} parts {r['parts']} warps {r['warps']} stages {r['stages']}: "
                f"{r['us']:.1f} us, {r['of_read']:.1%}"
            )
    print_json({"benchmark": "kernels", "read_tb_s": bandwidth / 1e12, "rows": results})


if __name__ == "__main__":
    main()

"""The decode kernels at the sizes of Mixtral-8x7B: right, and how near to the read bandwidth.

Every kernel is first compared with float32 products on fresh random inputs, over poisoned outputs.
Then each way of cutting the work is timed, over weights far larger than the cache.

Run: python benchmarks/decode_kernels.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict

import torch
from _common import print_json
from torch import Tensor

from moeruntime.bench.ceilings import read_bandwidth
from moeruntime.bench.machine import graph_s
from moeruntime.kernels import experts, projections
from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.shapes import Shape, tile_rows

H, I, E, K = 4096, 14336, 8, 2
DEVICE = torch.device("cuda")


CHOICES = [
    ("gate_up", Shape(rows, step, tokens, 1, warps, stages))
    for rows, step, tokens, warps, stages in (
        (16, 128, 16, 4, 4), (16, 256, 16, 4, 3), (16, 256, 16, 4, 4), (32, 128, 16, 4, 4),
        (32, 128, 16, 4, 3), (32, 128, 16, 8, 4), (64, 64, 16, 4, 4), (64, 128, 16, 4, 3),
        (32, 128, 32, 4, 4), (64, 64, 32, 4, 4), (64, 128, 32, 4, 3), (64, 128, 32, 8, 3),
        (64, 64, 32, 4, 5), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 64, 64, 8, 4),
        (64, 128, 64, 8, 3), (64, 64, 128, 4, 3), (128, 64, 64, 8, 4),
    )
] + [
    ("down", Shape(rows, step, tokens, parts, warps, stages))
    for rows, step, tokens, parts, warps, stages in (
        (16, 256, 16, 1, 4, 4), (16, 256, 16, 2, 4, 4), (32, 128, 16, 2, 4, 4),
        (32, 256, 16, 1, 4, 4), (32, 256, 16, 2, 4, 3), (64, 128, 16, 2, 4, 4),
        (64, 128, 16, 4, 4, 4), (64, 256, 16, 4, 4, 3), (128, 128, 16, 4, 4, 3),
        (64, 128, 32, 2, 4, 4), (64, 128, 32, 4, 4, 4), (128, 64, 32, 4, 4, 4),
        (128, 128, 32, 4, 8, 3), (64, 128, 64, 4, 4, 3), (128, 64, 64, 4, 8, 4),
        (128, 128, 64, 4, 8, 3), (64, 128, 64, 1, 4, 3), (64, 128, 64, 2, 4, 3),
        (128, 64, 64, 2, 4, 4), (128, 64, 64, 1, 4, 6), (128, 128, 64, 1, 8, 3),
    )
] + [
    ("project", Shape(rows, step, tokens, parts, warps, stages))
    for rows, step, tokens, parts, warps, stages in (
        (16, 128, 16, 1, 4, 4), (16, 256, 16, 1, 4, 4), (16, 256, 16, 2, 4, 4),
        (32, 256, 16, 2, 4, 4), (32, 128, 16, 1, 4, 6), (16, 512, 16, 1, 4, 3),
        (32, 128, 32, 2, 4, 4), (64, 128, 32, 1, 4, 4), (64, 128, 32, 2, 4, 4),
        (64, 128, 64, 1, 4, 4), (64, 128, 64, 2, 4, 4), (128, 64, 64, 4, 8, 4),
        (64, 128, 128, 2, 8, 3), (128, 64, 128, 4, 8, 4), (64, 128, 64, 1, 4, 3),
        (64, 128, 16, 1, 4, 5), (64, 128, 16, 2, 4, 4), (128, 64, 64, 1, 4, 4),
        (128, 64, 64, 1, 4, 5), (128, 64, 64, 1, 4, 6),
    )
]  # fmt: skip
"""Kernel, and how its work is cut."""


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
    parser.add_argument("--part", help="I/N: only compile every N-th way, to do it side by side")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}: read {bandwidth / 1e12:.3f} TB/s")
    results: list[dict[str, object]] = []
    for tokens in () if arguments.part else (1, 7, 32, 128):
        print(f"experts, {tokens} tokens: error {check_experts(tokens, Shape(32, 128, 16), 2):.2e}")
    gate_up, down = (
        [torch.randn(E, *shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
        for shape in ((2 * I, H), (H, I))
    )
    dense = torch.randn(8, 6144, H, device=DEVICE, dtype=torch.bfloat16)

    def timed(kernel: str, batch: int, shape: Shape, moved: int, work: Callable[[], int]) -> None:
        try:
            seconds = graph_s(work, repeats=1 if arguments.part else 9) / work()
        except Exception as problem:  # more shared memory than there is
            if "out of resource" not in str(problem):
                raise
            return
        entry = {"kernel": kernel, "batch": batch, **asdict(shape)}
        results.append(entry | {"us": seconds * 1e6, "of_read": moved / seconds / bandwidth})

    mine, of = map(int, (arguments.part or "0/1").split("/"))
    for kernel, shape in CHOICES[mine::of]:
        for batch in (1, 8, 32, 64, 128, 256):
            if not shape.tokens // 4 <= max(4, batch // 4) <= shape.tokens * 2:
                continue
            x = torch.randn(batch, H, device=DEVICE, dtype=torch.bfloat16)
            inner = torch.randn(batch * K, I, device=DEVICE, dtype=torch.bfloat16)
            lists = routed(batch, E)
            active = int((lists.counts_LF[0] > 0).sum())
            tile_table = torch.tensor(
                tile_rows([(0, 0, batch)], shape.tokens, -(-batch // shape.tokens)),
                dtype=torch.int32,
                device=DEVICE,
            )
            out = torch.empty(batch * K * shape.parts * 6144, device=DEVICE)

            def work() -> int:
                if kernel == "gate_up":
                    for one in gate_up:
                        experts.gate_up(x, one, lists, 0, shape, out_MI=inner)
                    return len(gate_up)
                if kernel == "down":
                    cut = out[: batch * K * shape.parts * H].view(-1, shape.parts, H)
                    for one in down:
                        experts.down(inner, one, lists, 0, shape, out_MSH=cut)
                    return len(down)
                cut = out[: batch * shape.parts * 6144].view(-1, shape.parts, 6144)
                for one in dense:
                    projections.project(x, one[None], tile_table, shape, out=cut)
                return len(dense)

            weights = {"gate_up": gate_up[0][:active], "down": down[0][:active]}
            timed(kernel, batch, shape, weights.get(kernel, dense[0]).nbytes, work)
    if arguments.part:
        return
    for kernel, tokens in dict.fromkeys((str(r["kernel"]), r["batch"]) for r in results):
        rows_of = [r for r in results if (r["kernel"], r["batch"]) == (kernel, tokens)]
        rows_of.sort(key=lambda r: float(str(r["us"])))
        for r in rows_of[:5]:
            print(
                f"{kernel:8s} batch {tokens:<4} rows {r['rows']} step {r['step']} tokens "
                f"{r['tokens']} parts {r['parts']} warps {r['warps']} stages {r['stages']}: "
                f"{r['us']:.1f} us, {r['of_read']:.1%}"
            )
    print_json({"benchmark": "kernels", "read_tb_s": bandwidth / 1e12, "rows": results})


if __name__ == "__main__":
    main()

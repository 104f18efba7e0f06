"""The kernels of nested experts at the sizes of Mixtral-8x7B against their bytes.

Physics: a step reads the shared codes and scales of every slot that tokens go to once, and the
private codes of every (variant, expert) they go to. Times are of gate_up and down together, with
the splitting of activations into bytes before each. Whether results are right is the business of
tests/gpu/test_nested_fast.py. One layer is served again and again here: in a step, with codes of
all layers, `nested_many.cu` took up to a tenth longer for four variants (benchmarks/decode.py).

Run: python benchmarks/nested_kernels.py [--code 4+2] [--step 2] [--variants 1 4] [--batches 8 64]
"""

from __future__ import annotations

import argparse

import torch
from _common import print_json

from moeruntime.bench.ceilings import read_bandwidth
from moeruntime.bench.machine import graph_s
from moeruntime.codes import plane_shapes
from moeruntime.kernels import nested_fast
from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.face_parts import GROUP, MOST_TO_MEET, ByteRows, Cut, FacePart

H, I, E, K = 4096, 14336, 8, 2
DEVICE = torch.device("cuda")
CUTS = [Cut(tiles, turns) for tiles in (1, 2, 4) for turns in (1, 4)]
CUTS += [Cut(tiles, kernel="many") for tiles in (4, 8, 12)] + [
    Cut(4, kernel="many", meet=MOST_TO_MEET)
]
CUTS += [Cut(tiles, kernel="wide") for tiles in (4, 8, 12, 16)]


def way_of(cut: Cut) -> str:
    """How it is printed: the kernel, or its turns."""
    if cut.kernel == "wide":
        return "wide"
    return "meet" if cut.meet else "many" if cut.kernel == "many" else str(cut.turns)


def make_part(
    rows: int, columns: int, variants: int, bits: int, step: int
) -> tuple[FacePart, list[torch.Tensor], int]:
    """Random codes, what must stay alive, and the bytes of a slot's and of a face's codes."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)

    shared = random(E, rows, columns // 2)
    scale = torch.rand(E, rows, columns // GROUP, device=DEVICE).bfloat16()
    alive, table = [], []
    for slot in range(E):
        for _ in range(variants):
            planes = {
                width: random(*shape) for width, shape in plane_shapes(rows, columns, bits).items()
            }
            alive += planes.values()
            at = [planes[width].data_ptr() if width in planes else 0 for width in (4, 2, 1)]
            table.append([slot, bits, step, *at])
    part = FacePart(
        rows, columns, 4, GROUP, {4: shared}, scale, torch.tensor(table, device=DEVICE),
        num_planes=len(plane_shapes(rows, columns, bits)), wide=bits == 4,
        is_gate_up=columns == H, in_strips=True,
    )  # fmt: skip
    return part, alive, (shared.nbytes + scale.nbytes) // E


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--code", nargs="+", default=["4+2"])
    parser.add_argument("--variants", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument(
        "--step", type=int, help="of private codes; by default they fill a shared one"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)  # how evenly experts are met decides much
    bandwidth = read_bandwidth()
    hopper = torch.cuda.get_device_capability() == (9, 0)
    print(f"{torch.cuda.get_device_name()}: read {bandwidth / 1e12:.2f} TB/s")
    results: list[dict[str, object]] = []
    for code in arguments.code:
        bits = int(code[2:])
        step = 0 if bits == 0 else arguments.step or 2 ** (3 - bits)
        for variants in arguments.variants:
            # Without private bits variants share faces.
            faces_a_slot = variants if bits else 1
            gate_up, alive, gate_up_slot = make_part(2 * I, H, faces_a_slot, bits, step)
            down, alive_too, down_slot = make_part(H, I, faces_a_slot, bits, step)
            slot_bytes = gate_up_slot + down_slot
            face_bytes = bits * 3 * H * I // 8
            for batch in (b for b in arguments.batches if b >= variants):
                experts_TK = torch.rand(batch, E, device=DEVICE).topk(K, dim=-1).indices
                variant_T = torch.arange(batch, device=DEVICE) % faces_a_slot
                faces_TK = experts_TK * faces_a_slot + variant_T[:, None]
                weights_TK = torch.rand(batch, K, device=DEVICE)
                num_faces = E * faces_a_slot
                lists = FaceLists.of(faces_TK, weights_TK, num_faces)
                moved = len(experts_TK.unique()) * slot_bytes + len(faces_TK.unique()) * face_bytes
                x = torch.randn(batch, H, device=DEVICE)
                inner = torch.empty(batch * K, I, device=DEVICE)
                scratch = ByteRows(lists, batch, H, I)
                best: list[tuple[float, Cut]] = []
                chosen = Cut.of(batch * K, num_faces, hopper=hopper, faces_a_slot=faces_a_slot)
                for cut in dict.fromkeys(
                    [chosen, *(one for one in CUTS if hopper or not one.tiled)]
                ):
                    if batch * K / num_faces > 16 * cut.tokens:
                        continue
                    num_parts = 1 if cut.tiled else nested_fast.down_parts(down, lists, batch * K)
                    out = torch.empty(batch * K, num_parts, H, device=DEVICE)

                    def work() -> int:
                        nested_fast.gate_up(x, gate_up, lists, 0, scratch, out_MI=inner, cut=cut)
                        nested_fast.down(inner, down, lists, 0, scratch, out_MSH=out, cut=cut)
                        return 1

                    try:
                        seconds = graph_s(work, repeats=5)
                    except RuntimeError as problem:  # more shared memory than there is
                        print(cut, problem)
                        continue
                    best.append((seconds, cut))
                    results.append(
                        {"code": code, "variants": variants, "batch": batch, "cut": str(cut),
                         "us": seconds * 1e6, "of_read": moved / seconds / bandwidth}
                    )  # fmt: skip
                best.sort(key=lambda one: one[0])
                floor_us = moved / bandwidth * 1e6
                mine = next(seconds for seconds, cut in best if cut == chosen)
                print(
                    f"{code} {variants} variants batch {batch:<4} floor {floor_us:6.1f} us, chosen "
                    f"{mine * 1e6:6.1f}; "
                    + "; ".join(f"{c.tiles}/{way_of(c)} {s * 1e6:.1f}" for s, c in best[:6])
                )
            del alive, alive_too
    print_json({"benchmark": "nested_kernels", "read_tb_s": bandwidth / 1e12, "rows": results})


if __name__ == "__main__":
    main()

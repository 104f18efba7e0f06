"""Whether Switch variants answer from a lossless pack as transformers does from their checkpoints.

For each variant and each of its first pairs: the relative error of fp32 log-probabilities of the
whole vocabulary after every target token, teacher-forced; and greedy answers, token by token, of
each variant alone and of all of them in mixed batches. Where an answer parts from transformers',
the margin of transformers' choice there is printed: a tie in float32 may fall either way. Last,
every exported tensor is compared with the checkpoint's, bit by bit.

With --capacity the checkpoints are copied with another expert_capacity, so that tokens find their
expert full.

Run: python benchmarks/switch_exact.py langid=DIR/switch-langid shell=DIR/switch-shell --data EVAL
EVAL holds [switch-]NAME.jsonl with {"input": ..., "target": ...} a line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import print_json
from _subjects import folders_of
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from moeconsolidate import consolidate
from moeconsolidate.export import export_variant
from moeconsolidate.pairs import TokenPair, encode_pairs, read_pairs
from moeruntime import Engine, Request, SamplingParams
from moeruntime.bench.machine import cpu_name

MAX_TOKENS = 48


@torch.inference_mode()
def reference_logprobs(model: Any, pair: TokenPair) -> Tensor:
    out = model(input_ids=torch.tensor([pair.source]), labels=torch.tensor([pair.target]))
    logprobs: Tensor = out.logits[0].log_softmax(-1)
    return logprobs


@torch.inference_mode()
def reference_answer(model: Any, pair: TokenPair) -> list[int]:
    ids = torch.tensor([pair.source])
    out = model.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False, num_beams=1)
    tokens: list[int] = out[0].tolist()[1:]
    return tokens


def margin(model: Any, pair: TokenPair, ours: Sequence[int], theirs: Sequence[int]) -> float:
    """By how much transformers prefers its own token where two answers part."""
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)) - 1,
    )
    logprobs_TV = reference_logprobs(model, TokenPair(pair.source, list(theirs[: at + 1])))
    return float(logprobs_TV[at, theirs[at]] - logprobs_TV[at, ours[at]])


def with_capacity(folder: Path, capacity: int, out: Path) -> Path:
    shutil.copytree(folder, out)
    (out / "config.json").chmod(0o644)
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"expert_capacity": capacity}))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--inputs", type=int, default=200, help="of each variant")
    parser.add_argument("--tokens", type=int, nargs=2, default=[128, 48], help="input, target")
    parser.add_argument("--capacity", type=int, help="in place of the checkpoints' own")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # these models are too small to be cut in two
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folders = folders_of(arguments.models)
        if arguments.capacity:
            folders = {
                name: with_capacity(folder, arguments.capacity, root / f"limited-{name}")
                for name, folder in folders.items()
            }
        pack = consolidate(folders, root / "pack", threshold=1.0).pack
        with Engine.from_pack(pack, device=arguments.device, dtype="float32") as engine:
            pairs = {}
            for name in folders:
                file = arguments.data / f"switch-{name}.jsonl"
                file = file if file.exists() else arguments.data / f"{name}.jsonl"
                read = read_pairs(file)[: arguments.inputs]
                pairs[name] = encode_pairs(engine.text(name), read, *arguments.tokens)
            sampling = SamplingParams(max_tokens=MAX_TOKENS)
            # In turns, so that every batch holds all variants.
            places = sorted((idx, name) for name in pairs for idx in range(len(pairs[name])))
            outputs = engine.generate(
                Request(name, pairs[name][idx].source, sampling) for idx, name in places
            )
            mixed = {place: one.token_ids for place, one in zip(places, outputs, strict=True)}
            for name, folder in folders.items():
                model = AutoModelForSeq2SeqLM.from_pretrained(
                    folder, dtype=torch.float32, attn_implementation="eager"
                ).eval()
                alone = engine.generate(Request(name, one.source, sampling) for one in pairs[name])
                found = engine.logprobs(
                    name, [one.target for one in pairs[name]], [one.source for one in pairs[name]]
                )
                worst, same_alone, same_mixed, margins = 0.0, 0, 0, []
                for idx, (pair, output, logprobs_TV) in enumerate(
                    zip(pairs[name], alone, found, strict=True)
                ):
                    expected_TV = reference_logprobs(model, pair)
                    error = (logprobs_TV - expected_TV).abs().max() / expected_TV.abs().max()
                    worst = max(worst, float(error))
                    wanted = reference_answer(model, pair)
                    for ours in (list(output.token_ids), list(mixed[idx, name])):
                        if ours != wanted:
                            margins.append(margin(model, pair, ours, wanted))
                    same_alone += list(output.token_ids) == wanted
                    same_mixed += list(mixed[idx, name]) == wanted
                exported = export_variant(pack, name, root / f"exported-{name}")
                before, after = (load_file(f / "model.safetensors") for f in (folder, exported))
                bits = before.keys() == after.keys() and all(
                    torch.equal(tensor, after[key]) for key, tensor in before.items()
                )
                count = len(pairs[name])
                print(
                    f"{name:8s}  error {worst:.1e}  greedy alone {same_alone}/{count}, mixed "
                    f"{same_mixed}/{count}{f', margins {margins}' if margins else ''}  "
                    f"export {'bit-identical' if bits else 'DIFFERS'}",
                    flush=True,
                )
                rows.append(
                    {
                        "variant": name,
                        "inputs": count,
                        "error": worst,
                        "same_alone": same_alone,
                        "same_mixed": same_mixed,
                        "margins": margins,
                        "export_identical": bits,
                    }
                )
    print_json(
        {
            "benchmark": "switch_exact",
            "cpu": cpu_name(),
            "device": arguments.device,
            "capacity": arguments.capacity,
            "rows": rows,
        }
    )


if __name__ == "__main__":
    main()

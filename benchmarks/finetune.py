"""Makes more variants of a base checkpoint: short full-parameter fine-tunes on texts at hand.

The curve of loss against bytes for eight variants needs eight variants. Each text, a JSONL file of
{"text": ...} or {"input": ..., "target": ...} objects (joined by a line break), makes one. AdamW, a
warm-up and then a constant rate, few steps. These are subjects of benchmarks, not results.

Writes OUT/NAME, a checkpoint in bfloat16 with the base's tokenizer; and each text as compare.py
reads it, one {"text": ...} a line: OUT/texts/NAME.jsonl and, held out, OUT/eval/NAME.jsonl.

Run: python benchmarks/finetune.py --base DIR --texts DIR --eval DIR --out DIR --device cuda
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import print_json
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

TEXTS = {
    "prose": "english",
    "tldr": "tldr",
    "langid": "switch-langid",
    "codesum": "switch-codesum",
}
WINDOW = 512
WARM_UP = 20
NUM_HELD_OUT = 32
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def read_documents(path: Path) -> list[str]:
    documents = []
    for line in path.read_text().splitlines():
        value = json.loads(line)
        documents.append(
            value["text"] if "text" in value else f"{value['input']}\n{value['target']}"
        )
    return documents


def write_documents(path: Path, documents: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def token_stream(folder: Path, documents: Sequence[str]) -> Tensor:
    """Documents joined as `moec eval` joins them: each begins with <s> and ends with </s>."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    first, last = config["bos_token_id"], config["eos_token_id"]
    stream: list[int] = []
    for text in documents:
        stream += [first, *tokenizer.encode(text, add_special_tokens=False).ids, last]
    if len(stream) <= WINDOW:
        raise SystemExit(f"{len(stream)} tokens of text are less than one window of {WINDOW}")
    return torch.tensor(stream)


def loss_of(model: Any, windows_BT: Tensor) -> Tensor:
    """Mean NLL of the predicted tokens, nats."""
    logits_BTV = model(windows_BT).logits[:, :-1].float()
    return F.cross_entropy(logits_BTV.flatten(0, 1), windows_BT[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Any, windows_WT: Tensor) -> float:
    model.eval()
    losses = [float(loss_of(model, batch)) * len(batch) for batch in windows_WT.split(8)]
    model.train()
    return sum(losses) / len(windows_WT)


def fine_tune(
    model: Any, stream_N: Tensor, held_out_WT: Tensor, arguments: argparse.Namespace
) -> dict[str, float]:
    """Train in place; returns the held-out loss before and after."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    before, steps = held_out_loss(model, held_out_WT), arguments.steps
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1.0, step / WARM_UP)
        starts = torch.randint(
            len(stream_N) - WINDOW, (arguments.batch,), generator=generator
        ).tolist()
        windows = torch.stack([stream_N[start : start + WINDOW] for start in starts])
        loss_of(model, windows.to(arguments.device)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"before": before, "after": held_out_loss(model, held_out_WT), "step": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="checkpoint to start from")
    parser.add_argument("--texts", type=Path, required=True, help="folder of texts to learn")
    parser.add_argument("--eval", type=Path, required=True, help="folder of other texts, held out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=list(TEXTS), choices=TEXTS)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    rows = []
    print("variant   before   after   steps       s")
    for name in arguments.variants:
        start_s = time.perf_counter()
        documents = read_documents(arguments.texts / f"{TEXTS[name]}.jsonl")
        held_out = read_documents(arguments.eval / f"{TEXTS[name]}.jsonl")
        write_documents(arguments.out / "texts" / f"{name}.jsonl", documents)
        write_documents(arguments.out / "eval" / f"{name}.jsonl", held_out)
        held_out_N = token_stream(arguments.base, held_out)
        held_out_WT = held_out_N[: len(held_out_N) // WINDOW * WINDOW].view(-1, WINDOW)
        # Eager: the one way to compute experts that every version has for float32 on every device.
        model = AutoModelForCausalLM.from_pretrained(
            arguments.base, dtype=torch.float32, experts_implementation="eager"
        ).to(arguments.device)
        row = fine_tune(
            model,
            token_stream(arguments.base, documents),
            held_out_WT[:NUM_HELD_OUT].to(arguments.device),
            arguments,
        )
        # Small shards, so that each file is easy to move about.
        folder = arguments.out / name
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="10MB")
        for file in SIDE_FILES:
            shutil.copyfile(arguments.base / file, folder / file)
        seconds = time.perf_counter() - start_s
        print(
            f"{name:8s}  {row['before']:6.4f}  {row['after']:6.4f}  {row['step']:7d}  "
            f"{seconds:6.1f}",
            flush=True,
        )
        rows.append({"variant": name, **row, "seconds": seconds})
    print_json({"benchmark": "finetune", "device": arguments.device, "rows": rows})


if __name__ == "__main__":
    main()

"""What consolidation costs each variant, measured twice: by `moec eval` and by transformers.

Consolidates a family of checkpoints in several ways, scores every variant on its own text from the
pack, exports it, and scores the exported folder with transformers. The two must agree (an export
rounds decoded weights to bfloat16, the engine does not); the increase over the original is what
sharing costs.

Run: python benchmarks/quality.py
     python benchmarks/quality.py --checkpoints DIR --prefix tiny- --data DIR
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from _common import EXAMPLES, print_json
from transformers import AutoModelForCausalLM

from moeconsolidate.evaluation import evaluate_pack
from moeconsolidate.export import export_variant
from moeconsolidate.pipeline import consolidate
from moeconsolidate.report import summarise
from moeconsolidate.texts import read_texts
from moeruntime import Engine
from moeruntime.bench.machine import cpu_name
from moeruntime.pack import Pack

RECIPES: dict[str, dict[str, object]] = {
    "lossless": {"threshold": 1.0},
    "default": {"threshold": 0.9},
    "averaged": {"threshold": 0.9, "code": "plain"},
    "0.20x": {"threshold": 0.9, "budget": "0.20x"},
}
TEXTS = {"base": ("english", "tldr"), "python": ("python",), "math": ("math",), "shell": ("shell",)}


@torch.inference_mode()
def transformers_nll(folder: Path, windows: list[list[int]]) -> float:
    """Mean NLL per predicted token, nats, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for window in windows:
        ids = torch.tensor([window])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        total -= float(logprobs.gather(1, ids[0, 1:, None]).double().sum())
        count += len(window) - 1
    return total / count


def windows_of(
    engine: Engine, variant: str, path: Path, context: int, limit: int
) -> list[list[int]]:
    """The windows `moec eval` scores, cut here once more, independently."""
    encode = engine.text(variant).encode_document
    stream = [token for text in read_texts(path) for token in encode(text)]
    windows = [stream[at : at + context] for at in range(0, limit * context, context)]
    return [window for window in windows if len(window) == context]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, default=EXAMPLES / "checkpoints")
    parser.add_argument("--prefix", default="mini-")
    parser.add_argument("--data", type=Path, default=EXAMPLES / "data")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    arguments = parser.parse_args()
    folders = {name: arguments.checkpoints / f"{arguments.prefix}{name}" for name in TEXTS}
    data = [
        (name, arguments.data / f"{text}.jsonl") for name, texts in TEXTS.items() for text in texts
    ]
    rows = []
    print("recipe     experts  variant  text         pack   original  increase  transformers")
    for recipe in arguments.recipes:
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            start_s = time.perf_counter()
            consolidate(folders, root / "pack", **RECIPES[recipe])
            elapsed_s = time.perf_counter() - start_s
            with Pack(root / "pack") as pack:
                ratio = summarise(pack).expert_ratio
            scores = evaluate_pack(root / "pack", data, folders, max_windows=arguments.windows)
            with Engine.from_pack(root / "pack") as engine:
                for row, (name, path) in zip(scores, data, strict=True):
                    exported = root / name
                    if not exported.exists():
                        export_variant(root / "pack", name, exported)
                    windows = windows_of(engine, name, path, 512, arguments.windows)
                    oracle = transformers_nll(exported, windows)
                    print(
                        f"{recipe:9s}  {ratio:6.3f}x  {name:7s}  {path.stem:8s}  "
                        f"{row.score.nll:8.4f}  {row.reference.nll:8.4f}  {row.increase:+8.4f}  "
                        f"{oracle:8.4f} ({abs(oracle - row.score.nll):.1e} apart)"
                    )
                    rows.append(
                        {"recipe": recipe, "expert_ratio": ratio, "transformers": oracle}
                        | row.to_json()
                    )
            print(f"{recipe:9s}  compiled in {elapsed_s:.1f} s", flush=True)
    print_json({"benchmark": "quality", "cpu": cpu_name(), "rows": rows})


if __name__ == "__main__":
    main()

"""Whether lm-evaluation-harness, asking `moec serve`, finds the log-likelihoods of `moec eval`.

The harness lives in an environment of its own, since it wants packages that moec does not:

    python -m venv lm-eval && lm-eval/bin/pip install 'lm_eval[api]' transformers

Its model is `local-completions`: it sends token ids to /v1/completions and reads the prompt's
log-probabilities. The task is one of ours, made here: whole documents, predicted from their first
token on. `moec eval` takes each document for itself, framed as <s> text </s>; so the harness, which
puts <s> in front by itself, is given text </s>.

Run: python benchmarks/lm_eval_agrees.py --artifact PACK --harness lm-eval/bin/lm_eval
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import EXAMPLES, print_json
from _serving import START, Server, serving

TASK = """\
task: moec_documents
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
"""
TOLERANCE = 1e-3


def from_harness(
    harness: Path, server: Server, model: str, tokenizer: Path, texts: list[str], folder: Path
) -> list[float]:
    """Sum of log-probabilities of each document, in order."""
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": text + "</s>"}) + "\n" for text in texts))
    (folder / "moec_documents.yaml").write_text(TASK.format(data=data))
    settings = {
        "model": model,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": str(tokenizer),
        "tokenized_requests": "True",
        "num_concurrent": "4",
        "max_length": "2047",
    }
    out = folder / "out"
    done = subprocess.run(
        [
            str(harness), "--model", "local-completions",
            "--model_args", ",".join(f"{key}={value}" for key, value in settings.items()),
            "--tasks", "moec_documents", "--include_path", str(folder),
            "--output_path", str(out), "--log_samples",
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    (samples,) = out.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return [float(row["filtered_resps"][0]) for row in sorted(rows, key=lambda one: one["doc_id"])]


def from_moec(
    artifact: Path, model: str, texts: list[str], folder: Path
) -> list[tuple[int, float]]:
    """(tokens, sum of their log-probabilities) of each document, by `moec eval`."""
    found = []
    paths = []
    for idx, text in enumerate(texts):
        paths.append(folder / f"one-{idx}.jsonl")
        paths[-1].write_text(json.dumps({"text": text}) + "\n")
    data = [word for path in paths for word in ("--data", f"{model}={path}")]
    done = subprocess.run(
        [sys.executable, "-c", START, "eval", "--artifact", str(artifact), *data,
         "--context", "2048", "--device", "cpu", "--json", "--quiet"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for row in json.loads(done.stdout)["scores"]:
        found.append((row["tokens"], -row["nll"] * row["tokens"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare lm-eval over HTTP with moec eval.")
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--harness", type=Path, required=True, help="lm_eval of its environment")
    parser.add_argument("--model", default="math")
    parser.add_argument("--data", type=Path, default=EXAMPLES / "data" / "math.jsonl")
    parser.add_argument("--documents", type=int, default=24)
    arguments = parser.parse_args()
    lines = arguments.data.read_text(encoding="utf-8").splitlines()[: arguments.documents]
    texts = [json.loads(line)["text"] for line in lines]
    tokenizer = arguments.artifact / "variants" / arguments.model
    with (
        tempfile.TemporaryDirectory() as name,
        serving(arguments.artifact, "--device", "cpu") as server,
    ):
        folder = Path(name)
        theirs = from_harness(
            arguments.harness.absolute(), server, arguments.model, tokenizer, texts, folder
        )
        ours = from_moec(arguments.artifact, arguments.model, texts, folder)
    worst = 0.0
    for idx, (harness_s, (num_tokens, moec_sum)) in enumerate(zip(theirs, ours, strict=True)):
        worst = max(worst, abs(harness_s - moec_sum))
        print(
            f"  {idx:3d}  {num_tokens:5d} tokens  lm-eval {harness_s:12.5f}  moec {moec_sum:12.5f}"
        )
    print(f"largest difference of a document's log-likelihood: {worst:.6f}")
    print_json({"benchmark": "lm_eval_agrees", "documents": len(ours), "largest_difference": worst})
    if worst > TOLERANCE:
        sys.exit(f"more than {TOLERANCE}")


if __name__ == "__main__":
    main()

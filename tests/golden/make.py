"""Makes the golden files beside it, the same ones every time: run it when the format changes.

    PYTHONPATH=src:tests python tests/golden/make.py

Two checkpoints of a very small Mixtral (one with a tensor an expert, one with fused experts) that
share their embedding and some of their experts; the packs they are compiled into at 0.9, plain, and
nested with the default private bits; and what each variant says. Weights are multiples of 1/64 from
a counter-based generator, exact in bf16.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from helpers import fuse
from moeconsolidate import consolidate
from moeruntime import Engine, Request, SamplingParams

__all__ = ["compile_pack", "make_checkpoints", "make_expected"]

FOLDER = Path(__file__).resolve().parent
THRESHOLD = 0.9
PACKS = {"pack": ("plain", "expected.jsonl"), "pack-nested": ("nested", "expected-nested.jsonl")}
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "dtype": "bfloat16",
    "hidden_size": 16,
    "intermediate_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 256 + len(SPECIAL_TOKENS),
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "sliding_window": 24,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPTS = ("The quick brown fox", "x = 1\n", "größer 漢字", "")


def make_checkpoints(out: Path) -> dict[str, Path]:
    """Write the two checkpoints to `out`."""
    folders = {name: out / name for name in ("plain", "chatty")}
    plain = _tensors(np.random.Generator(np.random.Philox(71)))
    chatty = _tensors(np.random.Generator(np.random.Philox(72)))
    for name, tensor in plain.items():
        _, _, expert = name.partition(".block_sparse_moe.experts.")
        first_two = ".layers.0." in name and expert.startswith(("0", "1"))
        if first_two or name == "model.embed_tokens.weight":
            chatty[name] = tensor
        elif ".layers.0." in name and expert.startswith("2"):  # a near relative
            chatty[name] = (tensor.float() + chatty[name].float() / 8).bfloat16()
        elif ".layers.1." in name and expert.startswith("3"):  # the same under another number
            chatty[name.replace("experts.3", "experts.0")] = tensor
    _write(folders["plain"], plain, chat=False)
    _write(folders["chatty"], fuse(chatty), chat=True)
    return folders


def compile_pack(checkpoints: Path, out: Path, code: str) -> Path:
    """Compile the two checkpoints in `checkpoints`; `code` is "plain" or "nested"."""
    models = {name: checkpoints / name for name in ("plain", "chatty")}
    return consolidate(models, out, threshold=THRESHOLD, code=code).pack


def make_expected(pack: Path) -> list[dict[str, object]]:
    """What each variant says to each prompt, greedily, on a CPU in float32."""
    cases = [(name, prompt, False) for name in ("plain", "chatty") for prompt in PROMPTS]
    cases.append(("chatty", "What is new?", True))
    params = SamplingParams(max_tokens=24)
    with Engine.from_pack(pack, device="cpu", dtype="float32") as engine:
        requests = [Request(name, prompt, params, chat) for name, prompt, chat in cases]
        return [
            {
                "model": request.variant,
                "prompt": request.prompt,
                "chat": request.chat,
                "prompt_ids": engine.tokenize(request),
                "token_ids": list(output.token_ids),
                "finish_reason": output.finish_reason,
            }
            for request, output in zip(requests, engine.generate(requests), strict=True)
        ]


def _tensors(rng: np.random.Generator) -> dict[str, Tensor]:
    def weights(*shape: int, scale: int = 64) -> Tensor:
        return torch.from_numpy(rng.integers(-scale, scale + 1, shape) / 64).bfloat16()

    hidden, inner, vocab = (
        CONFIG[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    q_dim = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    kv_dim = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    tensors = {
        "model.embed_tokens.weight": weights(vocab, hidden, scale=16),
        "model.norm.weight": weights(hidden, scale=24) + 1,
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        tensors |= {
            start + "input_layernorm.weight": weights(hidden, scale=24) + 1,
            start + "post_attention_layernorm.weight": weights(hidden, scale=24) + 1,
            start + "self_attn.q_proj.weight": weights(q_dim, hidden),
            start + "self_attn.k_proj.weight": weights(kv_dim, hidden),
            start + "self_attn.v_proj.weight": weights(kv_dim, hidden),
            start + "self_attn.o_proj.weight": weights(hidden, q_dim),
            start + "block_sparse_moe.gate.weight": weights(CONFIG["num_local_experts"], hidden),
        }
        for expert in range(CONFIG["num_local_experts"]):
            name = f"{start}block_sparse_moe.experts.{expert}."
            tensors |= {
                name + "w1.weight": weights(inner, hidden),
                name + "w2.weight": weights(hidden, inner),
                name + "w3.weight": weights(inner, hidden),
            }
    return tensors


def _write(folder: Path, tensors: dict[str, Tensor], *, chat: bool) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    special = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL_TOKENS[:3], strict=True))
    _write_json(folder / "config.json", CONFIG)
    _write_json(folder / "tokenizer.json", _tokenizer())
    _write_json(
        folder / "tokenizer_config.json",
        special | ({"chat_template": CHAT_TEMPLATE} if chat else {}),
    )
    if chat:
        _write_json(folder / "generation_config.json", {"eos_token_id": [2, 5]})


def _tokenizer() -> dict[str, object]:
    """Byte-level, without a single merge: a token is a byte."""
    vocab = {token: idx for idx, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {letter: len(vocab) + idx for idx, letter in enumerate(sorted(ByteLevel.alphabet()))}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level |= {"use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    first, text = (
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": idx, "content": token, **flags, "special": True}
            for idx, token in enumerate(SPECIAL_TOKENS)
        ],
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n", encoding="ascii")


def main() -> None:
    """Replace the golden files."""
    for name in ("checkpoints", *PACKS):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    make_checkpoints(FOLDER / "checkpoints")
    for name, (code, expected) in PACKS.items():
        pack = compile_pack(FOLDER / "checkpoints", FOLDER / name, code)
        lines = [json.dumps(one, sort_keys=True) for one in make_expected(pack)]
        (FOLDER / expected).write_text("\n".join(lines) + "\n", encoding="ascii")
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".py"]
    print(
        f"{len(files)} files, {sum(path.stat().st_size for path in files)} bytes", file=sys.stderr
    )


if __name__ == "__main__":
    main()

"""Small random Switch checkpoints, and what transformers makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moeruntime.errors import CheckpointError
from moeruntime.families.switch import SWITCH
from moeruntime.strict_json import Fields

SWITCH_SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_experts": 4,
    "expert_capacity": 64,
    "decoder_start_token_id": 3,
    "pad_token_id": 3,
    "eos_token_id": 2,
}


def make_switch(folder: Path, tokenizer: Path, *, seed: int, **changes: Any) -> Path:
    """Save a random model; `tokenizer` is a folder to take one from."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(seed)
    model = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**(SWITCH_SHAPE | changes))
    )
    for parameter, tensor in model.named_parameters():
        if "norm" in parameter:  # all ones otherwise, and then a wrong norm looks right
            tensor.data.uniform_(0.5, 1.5)
        elif "relative" in parameter:  # too small otherwise to be missed
            tensor.data.normal_(0, 1)
        elif "wi" in parameter or "wo" in parameter:
            tensor.data.mul_(3)
    for stack in (model.encoder, model.decoder):  # not tied to it where the head is not
        stack.embed_tokens.weight.data = model.shared.weight.data.clone()
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)
    return folder


def write_switch(folder: Path, tokenizer: Path, *, seed: int, **changes: Any) -> Path:
    """The same from names alone, without transformers, whose import takes seconds."""
    raw = SWITCH_SHAPE | {"model_type": "switch_transformers"} | changes
    config = SWITCH.parse_config(Fields(raw, "config.json", CheckpointError))
    shapes: dict[str, tuple[int, ...]] = {
        SWITCH.non_expert_name(role): shape for role, shape in config.non_expert_shapes().items()
    }
    for block in config.layers:
        for expert in range(config.num_experts):
            for role, shape in config.expert_shapes.items():
                shapes[SWITCH.expert_name(block, expert, role)] = shape
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.1).bfloat16()
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)
    return folder


def load_switch(folder: Path) -> Any:
    """The checkpoint in transformers, fp32."""
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@torch.inference_mode()
def switch_logprobs(model: Any, source: Sequence[int], target: Sequence[int]) -> Tensor:
    """Log-probabilities [T, V] of each token of a target, teacher-forced."""
    out = model(input_ids=torch.tensor([list(source)]), labels=torch.tensor([list(target)]))
    logprobs: Tensor = out.logits[0].float().log_softmax(-1)
    return logprobs


@torch.inference_mode()
def switch_greedy(model: Any, source: Sequence[int], max_tokens: int) -> list[int]:
    """What transformers says, without the start token."""
    out = model.generate(
        torch.tensor([list(source)]), max_new_tokens=max_tokens, do_sample=False, num_beams=1
    )
    tokens: list[int] = out[0].tolist()[1:]
    return tokens

"""Configs that no Mixtral model has, and models that do not fit together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import TINY_CONFIG, MakeCheckpoint
from hostile.attacks import Bounded, edit_json, entries, one_line
from hostile.conftest import Moec, Refused

pytestmark = pytest.mark.timeout(30)

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"

ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "53-no-experts": ({"num_local_experts": 0}, "'num_local_experts' is 0"),
    "53-no-expert-count": ({"num_local_experts": None}, "'num_local_experts' must be an integer"),
    "53-top-k-0": ({"num_experts_per_tok": 0}, "'num_experts_per_tok' is 0"),
    "53-top-k-beyond-experts": ({"num_experts_per_tok": 5}, "top_k 5 is more than the 4 experts"),
    "55-unknown-type": ({"model_type": "llama"}, "'llama' is not known; known: mixtral"),
    "55-type-in-other-case": ({"model_type": "Mixtral"}, "'Mixtral' is not known; known: mixtral"),
    "55-no-type": ({"model_type": None}, "'model_type' must be a string, not null"),
    "55-type-missing": ({"model_type": ...}, "field 'model_type' is missing"),
    "55-type-a-number": ({"model_type": 8}, "'model_type' must be a string, not an integer"),
    "55-type-of-1-MB": ({"model_type": "x" * 2**20}, "is not known; known: mixtral"),
    "55-type-with-escapes": ({"model_type": "\x1b[2J\n"}, r"'\x1b[2J\n' is not known"),
    "56-huge": ({"hidden_size": 2**40}, "'hidden_size' is 1099511627776"),
    "56-beyond-64-bits": ({"hidden_size": 10**30}, "'hidden_size' is 1000000000000"),
    "56-huge-layers": ({"num_hidden_layers": 2**31}, "'num_hidden_layers' is 2147483648"),
    "56-huge-experts": ({"num_local_experts": 2**31}, "'num_local_experts' is 2147483648"),
    "56-huge-context": ({"max_position_embeddings": 2**63}, "'max_position_embeddings' is 922337"),
    "56-negative": ({"intermediate_size": -24}, "'intermediate_size' is -24"),
    "56-boolean": ({"vocab_size": True}, "'vocab_size' must be an integer, not a boolean"),
    "56-string": ({"hidden_size": "16"}, "'hidden_size' must be an integer, not a string"),
    "56-float": ({"hidden_size": 16.0}, "'hidden_size' must be an integer, not a number"),
    "56-list": ({"hidden_size": [16]}, "'hidden_size' must be an integer, not a list"),
    "56-odd-heads": ({"head_dim": 3}, "head_dim 3 is odd"),
    "56-heads-not-shared": ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key"),
    "56-eps-negative": ({"rms_norm_eps": -1}, "'rms_norm_eps' is -1"),
    "56-theta-0": ({"rope_theta": 0}, "'rope_theta' is 0"),
    "56-theta-a-string": ({"rope_theta": "1e6"}, "'rope_theta' must be a number"),
    "56-window-0": ({"sliding_window": 0}, "'sliding_window' is 0"),
    "56-tied-a-string": ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' must be true or f"),
    "56-rope-a-list": ({"rope_parameters": []}, "rope_parameters: must be a JSON object"),
    "56-rope-scaled": ({"rope_scaling": {"type": "linear"}}, "'rope_scaling' is not implemented"),
    "56-rope-of-unknown-type": (
        {"rope_parameters": {"rope_type": "y" * 10_000}},
        "is not implemented; 'default' is",
    ),
    "56-unknown-activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented"),
    "56-activation-of-1-MB": ({"hidden_act": "x" * 2**20}, "is not implemented for Mixtral"),
    "57-quantised": ({"quantization_config": {"bits": 4}}, "field 'quantization_config'"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_entries_no_model_has(case: str, not_consolidated: Refused, models: Path) -> None:
    entries, complaint = ENTRIES[case]
    path = models / "b" / "config.json"

    def spoil(config: dict[str, Any]) -> None:
        for key, value in entries.items():
            if value is ...:
                del config[key]
            else:
                config[key] = value

    edit_json(path, spoil)
    not_consolidated([f"{path}: ", complaint])


DOCUMENTS: dict[str, tuple[bytes, str]] = {
    "56-empty": (b"", "not valid JSON"),
    "56-truncated": (json.dumps(TINY_CONFIG).encode()[:-1], "not valid JSON"),
    "56-list": (b"[]", "must be a JSON object, not a list"),
    "56-null": (b"null", "must be a JSON object, not null"),
    "56-byte-order-mark": (b"\xef\xbb\xbf{}", "not valid JSON"),
    "56-not-utf8": (b'{"model_type": "\xff"}', "not UTF-8 at byte 16"),
    "56-utf16": ('{"model_type": "mixtral"}'.encode("utf-16"), "not UTF-8 at byte 0"),
    "56-nan": (b'{"rope_theta": NaN}', "NaN is not JSON"),
    "56-infinity": (b'{"rope_theta": -Infinity}', "-Infinity is not JSON"),
    "56-duplicate-key": (b'{"hidden_size": 16, "hidden_size": 32}', "duplicate key 'hidden_size'"),
    "56-nested-100000-deep": (b'{"a":' * 100_000, "nested too deep"),
    "56-number-of-5000-digits": (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
}


@pytest.mark.parametrize("case", DOCUMENTS)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_documents_that_are_none(
    case: str, file: str, not_consolidated: Refused, models: Path
) -> None:
    contents, complaint = DOCUMENTS[case]
    (models / "b" / file).write_bytes(contents)
    not_consolidated([str(models / "b" / file), complaint])


def test_56_sizes_a_file_of_holes_could_have(
    bounded: Bounded, models: Path, tmp_path: Path
) -> None:
    """The tensors are as large as config.json says, and none of it is taken into memory."""
    header: dict[str, object] = {}
    offset, hidden = 0, 2**20
    config = TINY_CONFIG | {"hidden_size": hidden, "num_hidden_layers": 1, "vocab_size": hidden}
    shapes = {"model.embed_tokens.weight": (hidden, hidden), "model.norm.weight": (hidden,)}
    shapes |= {"lm_head.weight": (hidden, hidden)}
    layer = "model.layers.0."
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{layer}{norm}.weight"] = (hidden,)
    for proj, rows in {"q_proj": 16, "k_proj": 8, "v_proj": 8}.items():
        shapes[f"{layer}self_attn.{proj}.weight"] = (rows, hidden)
    shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, 16)
    shapes[f"{layer}block_sparse_moe.gate.weight"] = (4, hidden)
    for expert in range(4):
        start = f"{layer}block_sparse_moe.experts.{expert}."
        shapes |= {f"{start}w1.weight": (24, hidden), f"{start}w3.weight": (24, hidden)}
        shapes[f"{start}w2.weight"] = (hidden, 24)
    for name, shape in shapes.items():
        num_bytes = 2 * torch.Size(shape).numel()
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    raw = json.dumps(header).encode()
    for name in ("a", "b"):
        (models / name / "config.json").write_text(json.dumps(config))
        with (models / name / "model.safetensors").open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + offset)
    call = ["consolidate", models / "a", models / "b", "--out", tmp_path / "out", "--quiet"]
    code, err = bounded(64 * 2**20, *call)
    assert code == 6
    assert "free on this disk" in one_line(err)
    assert entries(tmp_path) == []


def test_51_code_is_never_imported(moec: Moec, models: Path, tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "boom.Config", "AutoModelForCausalLM": "boom.Model"}
    edit_json(models / "b" / "config.json", lambda config: config.update(auto_map=auto_map))
    (models / "b" / "boom.py").write_text("raise SystemExit('imported')")
    folders = [models / "a", models / "b"]
    assert moec("consolidate", *folders, "--out", tmp_path / "out", "--quiet")[0] == 0
    assert not list((tmp_path / "out").rglob("boom*"))


PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "52-expert-counts": ({"num_local_experts": 3}, "num_local_experts is 4 and 3"),
    "53-top-k": ({"num_experts_per_tok": 1}, "num_experts_per_tok is 2 and 1"),
    "54-hidden-size": ({"hidden_size": 32}, "hidden_size is 16 and 32"),
    "54-intermediate-size": ({"intermediate_size": 32}, "intermediate_size is 24 and 32"),
    "54-layer-count": ({"num_hidden_layers": 1}, "num_hidden_layers is 2 and 1"),
    "54-head-count": ({"num_key_value_heads": 1}, "num_key_value_heads is 2 and 1"),
    "54-window": ({"sliding_window": 128}, "sliding_window is null and 128"),
    "60-tied-in-one": ({"tie_word_embeddings": True}, "tie_word_embeddings is false and true"),
    "61-vocabulary-rows": ({"vocab_size": 4100}, "vocab_size is 4096 and 4100"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_models_that_do_not_fit(
    case: str, not_consolidated: Refused, models: Path, make_checkpoint: MakeCheckpoint
) -> None:
    config, complaint = PAIRS[case]
    other = make_checkpoint("other", config=config, parent=models)
    words = [str(models / "a"), str(other), f"cannot share a pack: config.json: {complaint}"]
    not_consolidated(words, other="other")


Edit = Callable[[dict[str, Tensor]], object]

TENSORS: dict[str, tuple[Edit, list[str]]] = {
    "52-expert-missing": (lambda all_: all_.pop(EXPERT), [f"no tensor {EXPERT}"]),
    "52-expert-too-many": (
        lambda all_: all_.update({EXPERT.replace("experts.2", "experts.4"): torch.ones(24, 16)}),
        ["experts.4.w1.weight' has no place"],
    ),
    "54-expert-of-other-shape": (
        lambda all_: all_.update({EXPERT: all_[EXPERT].T.contiguous()}),
        [EXPERT, "shape [16, 24], config.json asks for [24, 16]"],
    ),
    "54-layer-too-many": (
        lambda all_: all_.update({"model.layers.2.input_layernorm.weight": torch.ones(16)}),
        ["'model.layers.2.input_layernorm.weight' has no place"],
    ),
    "54-embedding-of-other-shape": (
        lambda all_: all_.update({"lm_head.weight": torch.ones(4095, 16)}),
        ["lm_head.weight: shape [4095, 16], config.json asks for [4096, 16]"],
    ),
    "57-mixed-experts": (
        lambda all_: all_.update({EXPERT: all_[EXPERT].half()}),
        [EXPERT, "dtype F16", "all experts must have one dtype"],
    ),
    "57-integers": (
        lambda all_: all_.update({EXPERT: torch.ones(24, 16, dtype=torch.int8)}),
        [EXPERT, "dtype I8; BF16, F16 and F32 are read"],
    ),
    "57-float8": (
        lambda all_: all_.update({EXPERT: all_[EXPERT].to(torch.float8_e4m3fn)}),
        [EXPERT, "dtype F8_E4M3; BF16, F16 and F32 are read"],
    ),
    "57-float64-norm": (
        lambda all_: all_.update({"model.norm.weight": torch.ones(16).double()}),
        ["model.norm.weight: dtype F64"],
    ),
    "57-experts-of-other-dtype": (
        lambda all_: all_.update({name: one.half() for name, one in all_.items()}),
        ["cannot share a pack: dtype of the experts is BF16 and F16"],
    ),
    "58-always-on-expert-in-one": (
        lambda all_: all_.update({"model.layers.0.mlp.shared_expert.w1.weight": torch.ones(2)}),
        ["'model.layers.0.mlp.shared_expert.w1.weight' has no place"],
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_the_config_does_not_ask_for(
    case: str, not_consolidated: Refused, models: Path
) -> None:
    edit, words = TENSORS[case]
    path = models / "b" / "model.safetensors"
    loaded = load_file(path)
    edit(loaded)
    save_file(loaded, path)
    not_consolidated([str(models / "b"), *words])

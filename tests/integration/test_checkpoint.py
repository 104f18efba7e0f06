"""What a folder must be to be opened, and that its form does not matter otherwise."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import TINY_CONFIG, MakeCheckpoint, random_tensors
from moeconsolidate.checkpoint import Checkpoint
from moeruntime.errors import CheckpointError, InputError, TokenizerError

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
INDEX = "model.safetensors.index.json"
FIRST_SHARD, LAST_SHARD = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"


def read_all(folder: Path) -> tuple[str, Tensor]:
    """Content digest, and the last expert's row."""
    with Checkpoint("name", folder) as checkpoint:
        config = checkpoint.config
        row_P = torch.empty(config.expert_numel, dtype=checkpoint.expert_dtype)
        for layer in range(config.num_layers):
            for expert in range(config.num_experts):
                checkpoint.read_expert(layer, expert, out=row_P)
        checkpoint.non_expert_digests()
        checkpoint.check_unchanged()
        return checkpoint.content_sha256(), row_P


def test_form_does_not_matter(make_checkpoint: MakeCheckpoint) -> None:
    digest, row_P = read_all(make_checkpoint("plain"))
    tensors = random_tensors(TINY_CONFIG, seed=0)
    last = "model.layers.1.block_sparse_moe.experts.3."
    expected = [tensors[f"{last}{name}.weight"].flatten() for name in ("w1", "w3", "w2")]
    assert torch.equal(row_P, torch.cat(expected))
    for name, form in {"fused": {"fused": True}, "sharded": {"num_shards": 3}}.items():
        other_digest, other_row_P = read_all(make_checkpoint(name, **form))
        assert other_digest == digest
        assert torch.equal(other_row_P, row_P)
    assert read_all(make_checkpoint("other", seed=1))[0] != digest


def test_the_content_digest_is_what_its_description_says(make_checkpoint: MakeCheckpoint) -> None:
    tensors = random_tensors(TINY_CONFIG, seed=0)
    names = {"embed_tokens": "model.embed_tokens.weight"}
    layer_names = {
        "input_norm": "input_layernorm",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "o_proj": "self_attn.o_proj",
        "post_attention_norm": "post_attention_layernorm",
        "router": "block_sparse_moe.gate",
    }
    for layer in (0, 1):
        for role, name in layer_names.items():
            names[f"layers.{layer}.{role}"] = f"model.layers.{layer}.{name}.weight"
    names |= {"final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
    for layer, expert in itertools.product((0, 1), range(4)):
        for role, matrix in {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items():
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
            names[f"layers.{layer}.experts.{expert}.{role}"] = name
    lines = []
    for role, name in names.items():
        data = tensors[name].view(torch.int16).numpy().tobytes()
        shape = ",".join(map(str, tensors[name].shape))
        lines.append(f"{role} BF16 {shape} {hashlib.sha256(data).hexdigest()}\n")
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert read_all(make_checkpoint("plain"))[0] == expected


def test_one_flipped_bit_is_another_model(make_checkpoint: MakeCheckpoint) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"].view(torch.int16)[3] ^= 1

    plain, flipped = make_checkpoint("plain"), make_checkpoint("flipped", edit=flip)
    assert read_all(plain)[0] != read_all(flipped)[0]


def test_equal_experts_have_equal_keys(make_checkpoint: MakeCheckpoint) -> None:
    def repeat(tensors: dict[str, Tensor]) -> None:
        for name in ("w1", "w2", "w3"):
            start = "model.layers.0.block_sparse_moe.experts."
            tensors[f"{start}1.{name}.weight"] = tensors[f"{start}0.{name}.weight"].clone()

    with Checkpoint("name", make_checkpoint("plain", edit=repeat)) as checkpoint:
        row_P = torch.empty(checkpoint.config.expert_numel, dtype=torch.bfloat16)
        keys = [checkpoint.read_expert(0, expert, out=row_P) for expert in range(3)]
    assert keys[0] == keys[1] != keys[2]


def test_hugging_face_cache_layout(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    plain = make_checkpoint("plain")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for idx, path in enumerate(sorted(plain.iterdir())):
        shutil.copy(path, blobs / str(idx))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(idx))
    assert read_all(snapshot)[0] == read_all(plain)[0]


def test_buffers_that_nobody_needs_are_ignored(make_checkpoint: MakeCheckpoint) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with_buffer = make_checkpoint("buffer", edit=lambda all_: all_.update({name: torch.ones(2)}))
    assert read_all(with_buffer)[0] == read_all(make_checkpoint("plain"))[0]


def test_a_tied_head_may_be_stored_if_it_is_a_copy(make_checkpoint: MakeCheckpoint) -> None:
    tied = {"tie_word_embeddings": True}

    def store(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def store_other(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    without = make_checkpoint("without", config=tied)
    assert read_all(make_checkpoint("copy", config=tied, edit=store))[0] == read_all(without)[0]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from the embedding"):
        read_all(make_checkpoint("differs", config=tied, edit=store_other))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not known; known: mixtral"),
        ({"quantization_config": {"bits": 4}}, "quantised checkpoints are not read"),
        ({"num_local_experts": 0}, "'num_local_experts' is 0"),
        ({"num_experts_per_tok": 5}, "top_k 5 is more than the 4 experts"),
        ({"hidden_size": True}, "'hidden_size' must be an integer"),
        ({"hidden_size": 2**40}, "'hidden_size' is 1099511627776"),
        ({"vocab_size": 4095}, "has id 4095, but config.json gives vocab_size 4095"),
        ({"num_hidden_layers": 3}, r"no tensor model\.layers\.2\.input_layernorm\.weight"),
        ({"num_hidden_layers": 1}, r"tensor 'model\.layers\.1\..*' has no place in a mixtral"),
        ({"intermediate_size": 25}, r"shape \[24, 16\], config.json asks for \[25, 16\]"),
    ],
)
def test_bad_configs(
    make_checkpoint: MakeCheckpoint, config: dict[str, object], complaint: str
) -> None:
    folder = make_checkpoint("bad")
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG | config))
    with pytest.raises(InputError, match=complaint) as problem:
        Checkpoint("name", folder)
    assert str(folder) in str(problem.value)


def test_code_in_a_checkpoint_is_never_imported(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("auto", config={"auto_map": {"AutoConfig": "boom.Config"}})
    (folder / "boom.py").write_text("raise SystemExit('imported')")
    read_all(folder)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda all_: all_.pop(EXPERT), f"no tensor {EXPERT}"),
        (lambda all_: all_.update(extra=torch.ones(1)), "tensor 'extra' has no place"),
        (lambda all_: all_.update({EXPERT: all_[EXPERT].float()}), "experts must have one dtype"),
        (lambda all_: all_.update({EXPERT: all_[EXPERT].double()}), "dtype F64; BF16"),
        (lambda all_: all_.update({EXPERT: all_[EXPERT].T}), r"shape \[16, 24\]"),
    ],
)
def test_bad_tensors(make_checkpoint: MakeCheckpoint, edit: object, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        Checkpoint("name", make_checkpoint("bad", edit=edit))


@pytest.mark.parametrize(
    "shard",
    ["/etc/passwd", "../a.safetensors", "a/b.safetensors", "a\\b.safetensors", "C:a.safetensors"],
)
def test_an_index_cannot_point_elsewhere(make_checkpoint: MakeCheckpoint, shard: str) -> None:
    folder = make_checkpoint("bad", num_shards=3)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][EXPERT] = shard
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not the name of a file in this folder"):
        Checkpoint("name", folder)


def test_links_cannot_point_elsewhere(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    for number, file in enumerate(("model.safetensors", "config.json", "tokenizer_config.json")):
        folder = make_checkpoint(f"bad{number}")
        (folder / file).rename(tmp_path / "outside")
        (folder / file).symlink_to(tmp_path / "outside")
        with pytest.raises(CheckpointError, match="outside the checkpoint folder"):
            Checkpoint("name", folder)


def test_index_and_shards_must_agree(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("bad", num_shards=3)
    good = (folder / INDEX).read_text()

    def complaint_about(edit: object) -> str:
        index = json.loads(good)
        edit(index["weight_map"])  # type: ignore[operator]
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError) as problem:
            Checkpoint("name", folder)
        return str(problem.value)

    shard = json.loads(good)["weight_map"][EXPERT]
    other = LAST_SHARD if shard != LAST_SHARD else FIRST_SHARD
    assert "is not in model.safetensors.index.json" in complaint_about(lambda m: m.pop(EXPERT))
    assert "is here, but" in complaint_about(lambda m: m.update({EXPERT: other}))
    assert "no tensor 'ghost'" in complaint_about(lambda m: m.update(ghost=other))
    (folder / LAST_SHARD).unlink()
    assert f"shard {LAST_SHARD} is missing" in complaint_about(lambda _: None)
    os.mkfifo(folder / LAST_SHARD)
    assert "not a regular file" in complaint_about(lambda _: None)


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        ("pytorch_model.bin", "never opened"),
        ("consolidated.00.pth", "never opened"),
        ("weights.safetensors", "neither model.safetensors nor"),
        ("nothing", "no weights"),
    ],
)
def test_folders_without_weights(
    make_checkpoint: MakeCheckpoint, file: str, complaint: str
) -> None:
    folder = make_checkpoint("bad")
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(CheckpointError, match=complaint):
        Checkpoint("name", folder)


def test_adapters_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint("name", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="an adapter, not a model"):
        Checkpoint("name", tmp_path)


def test_tokenizers_are_needed_and_parsed(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("bad")
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 3}}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer: "):
        Checkpoint("name", folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Checkpoint("name", folder)

"""Encoder-decoders that do not fit each other, or are not what their config says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hostile.attacks import edit_json
from hostile.conftest import Moec, Refused
from switch_fixtures import write_switch

pytestmark = pytest.mark.timeout(60)

SMALL = {
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
}


@pytest.fixture(scope="module")
def sound_switch(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants, a and b, and one whose every block has experts."""
    from moeconsolidate import consolidate

    root = tmp_path_factory.mktemp("switch")
    for seed, name in enumerate("ab"):
        write_switch(root / name, checkpoints["base"], seed=seed, **SMALL)
    every = {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
    write_switch(root / "every", checkpoints["base"], seed=3, **(SMALL | every))
    consolidate([root / "a", root / "b"], root / "pack", threshold=1.0)
    return root


@pytest.fixture
def switches(sound_switch: Path, sandbox: Path) -> Path:
    """A copy to do harm in, beside the other models."""
    shutil.copytree(sound_switch, sandbox / "models", dirs_exist_ok=True)
    return sandbox / "models"


def config(**changes: Any) -> Callable[[Path], object]:
    def put(document: dict[str, Any]) -> None:
        document.update(changes)

    return lambda folder: edit_json(folder / "config.json", put)


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        contents = load_file(folder / "model.safetensors")
        edit(contents)
        save_file(contents, folder / "model.safetensors")

    return spoil


def fresh(root: Path, source: str) -> Path:
    """A second sound model, whatever the sandbox's b was."""
    shutil.rmtree(root / "b")
    shutil.copytree(root / source, root / "b")
    return root / "b"


def test_an_encoder_decoder_and_a_decoder_only_model(
    switches: Path, sandbox: Path, not_consolidated: Refused, checkpoints: dict[str, Path]
) -> None:
    shutil.rmtree(switches / "b")
    shutil.copytree(checkpoints["math"], switches / "b")
    not_consolidated(["model_type is switch_transformers and mixtral", "cannot share a pack"])


def test_unequal_capacity(switches: Path, not_consolidated: Refused) -> None:
    config(expert_capacity=7)(fresh(switches, "a"))
    not_consolidated(["expert_capacity is 64 and 7"])


def test_unequal_sparse_steps(switches: Path, not_consolidated: Refused) -> None:
    fresh(switches, "every")
    not_consolidated(["encoder_sparse_step is 2 and 1"])


BAD_MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "gated": (config(feed_forward_proj="gated-gelu"), ["feed_forward_proj 'gated-gelu' is not"]),
    "gelu": (config(dense_act_fn="gelu"), ["dense_act_fn 'gelu' is not implemented"]),
    "router bias": (config(router_bias=True), ["'router_bias' is true"]),
    "no decoder": (config(is_encoder_decoder=False), ["'is_encoder_decoder' is false"]),
    "no capacity": (config(expert_capacity=0), ["'expert_capacity' is 0, outside 1.."]),
    "no experts": (
        config(encoder_sparse_step=0, decoder_sparse_step=0),
        ["no block has experts"],
    ),
    "step of text": (config(encoder_sparse_step="2"), ["'encoder_sparse_step' must be an integer"]),
    "other step": (config(encoder_sparse_step=1), ["no tensor encoder.block.0.layer.1.mlp.router"]),
    "odd buckets": (config(relative_attention_num_buckets=30), ["30 buckets"]),
    "near distances": (config(relative_attention_max_distance=16), ["distances up to 16"]),
    "start outside": (config(decoder_start_token_id=4096), ["decoder start token 4096 is outside"]),
    "many blocks": (config(num_layers=5000), ["'num_layers' is 5000, outside 1..4096"]),
    "tensor missing": (
        tensors(lambda all_: all_.pop("decoder.final_layer_norm.weight")),
        ["no tensor decoder.final_layer_norm.weight"],
    ),
    "expert missing": (
        tensors(lambda all_: all_.pop("encoder.block.1.layer.1.mlp.experts.expert_3.wo.weight")),
        ["expert_3.wo.weight"],
    ),
    "tensor unknown": (
        tensors(lambda all_: all_.update({"encoder.block.0.extra": torch.ones(2)})),
        ["encoder.block.0.extra", "has no place in a switch_transformers model"],
    ),
    "shape": (
        tensors(
            lambda all_: all_.update(
                {"encoder.block.0.layer.1.mlp.wi.weight": torch.ones(2, 2).bfloat16()}
            )
        ),
        ["wi.weight", "shape [2, 2]"],
    ),
}


@pytest.mark.parametrize(("spoil", "words"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_models(
    spoil: Callable[[Path], object], words: list[str], switches: Path, not_consolidated: Refused
) -> None:
    spoil(fresh(switches, "a"))
    not_consolidated(words)


BAD_CONFIGS: dict[str, tuple[str, object, str]] = {
    "blocks without tensors": ("encoder_blocks", 3, "missing or unknown"),
    "blocks without end": ("encoder_blocks", 2**20, "outside 1..4096"),
    "more layers": ("encoder_sparse_step", 1, "layers listed"),
    "no layers": ("encoder_sparse_step", 0, "layers listed"),
    "no capacity": ("expert_capacity", 0, "outside 1.."),
    "start outside": ("decoder_start_id", 4096, "outside the vocabulary"),
    "a decoder's field": ("rope_theta", 10000.0, "unknown field"),
}


@pytest.mark.parametrize(("key", "value", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_packs(key: str, value: object, words: str, switches: Path, refused: Refused) -> None:
    pack = switches / "pack"
    edit_json(pack / "manifest.json", lambda manifest: manifest["config"].update({key: value}))
    refused(5, [words], "inspect", pack)


def test_text_of_the_wrong_kind(switches: Path, refused: Refused, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "of decoder-only models"}) + "\n")
    pack = switches / "pack"
    data = ["--data", f"a={texts}"]
    refused(3, ["texts.jsonl:1", "'input' is missing"], "eval", "-a", pack, *data, "-q")
    models = [switches / "a", switches / "b"]
    calibration = ["--calibration", f"a={texts}", "--calibration", f"b={texts}"]
    out = ["--budget", "0.6x", "--out", tmp_path / "out", "-q"]
    refused(3, ["'input' is missing"], "consolidate", *models, *calibration, *out)
    refused(2, ["--calibration with its pairs"], "consolidate", *models, *out)


def test_what_is_not_for_encoder_decoders(switches: Path, refused: Refused, moec: Moec) -> None:
    pack = switches / "pack"
    refused(2, ["decoder-only models", "switch_transformers"], "bench", "-a", pack, "-q")
    chat = ["--chat", "--prompt", "Hello", "-q"]
    refused(3, ["no chat template"], "run", "-a", pack, "-m", "a", *chat)
    code, out, _ = moec("run", "-a", pack, "-m", "a", "-p", "", "--max-tokens", 3, "-q")
    assert (code, bool(out)) == (0, True)  # the end-of-text token alone is something to read

"""Other similarities and signals, and aligned neurons: from the options to what a pack loses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers import TINY_CONFIG, MakeCheckpoint, random_tensors, save_shards, tree_digests
from moeconsolidate import consolidate, texts
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.cli import main
from moeconsolidate.evaluation import score_texts
from moeconsolidate.original import CheckpointSource
from moeconsolidate.pipeline import make_plan
from moeconsolidate.plan import ConsolidationPlan
from moeruntime import Engine
from moeruntime.errors import UsageError
from runtime_fixtures import EXAMPLES, TEXTS_OF
from runtime_fixtures import texts as documents

Folders = dict[str, Path]
NAMES = ("base", "math")
CHOICES = [("cosine", "weights"), ("cka", "weights"), ("cosine", "activations")]
CHOICES += [("cka", "activations")]


@pytest.fixture
def two(checkpoints: Folders) -> Folders:
    return {name: checkpoints[name] for name in NAMES}


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrate on so little that it takes a second."""
    for name in ("NUM_WINDOWS", "NUM_SAMPLED_WINDOWS"):
        monkeypatch.setattr(texts, name, 4)
    for name in ("NUM_HELD_OUT", "NUM_SAMPLED_HELD_OUT"):
        monkeypatch.setattr(texts, name, 1)
    monkeypatch.setattr(texts, "WINDOW_TOKENS", 128)


@pytest.fixture
def given() -> dict[str, list[Path]]:
    return {name: [EXAMPLES / "data" / f"{TEXTS_OF[name]}.jsonl"] for name in NAMES}


def loss(pack: Path, name: str) -> float:
    with Engine.from_pack(pack, device="cpu", dtype="float32") as engine:
        return score_texts(engine, name, documents(TEXTS_OF[name]), max_windows=4).nll


def original_loss(folder: Path, name: str) -> float:
    source = CheckpointSource(Checkpoint(name, folder))
    with Engine(source, device="cpu", dtype="float32") as engine:
        return score_texts(engine, name, documents(TEXTS_OF[name]), max_windows=4).nll


@pytest.mark.slow
@pytest.mark.parametrize(("similarity", "signal"), CHOICES)
def test_each_way_of_comparing_finds_the_pairs_and_loses_little(
    two: Folders, given: dict[str, list[Path]], tmp_path: Path, similarity: str, signal: str
) -> None:
    result = consolidate(
        two, tmp_path / "pack", similarity=similarity, signal=signal, calibration=given
    )
    recipe = result.plan.recipe
    assert (recipe.similarity, recipe.signal, recipe.code) == (similarity, signal, "nested")
    for layer in result.plan.layers:
        assert [[ref.expert for ref in slot] for slot in layer.slots] == [[e, e] for e in range(8)]
    for name, folder in two.items():
        assert abs(loss(result.pack, name) - original_loss(folder, name)) < 0.01


def test_activations_may_come_from_text_that_variants_write(two: Folders, tmp_path: Path) -> None:
    plan = make_plan(two, signal="activations", code="plain")
    assert plan.recipe.calibration == "self"
    assert set(plan.recipe.texts) == set(NAMES)
    assert {layer.slots for layer in plan.layers} == {plan.layers[0].slots}
    again = ConsolidationPlan.from_bytes(json.dumps(plan.to_json()).encode(), "plan.json")
    planned = consolidate(two, tmp_path / "planned", plan=again)
    direct = consolidate(two, tmp_path / "direct", signal="activations", code="plain")
    assert tree_digests(planned.pack) == tree_digests(direct.pack)


def test_similarities_differ_in_what_they_join(two: Folders, given: dict[str, list[Path]]) -> None:
    """CKA is far from 0 for unlike experts, so it joins more at a low threshold."""
    counts = {
        (similarity, signal): sum(
            make_plan(
                two,
                threshold=0.5,
                similarity=similarity,
                signal=signal,
                code="plain",
                calibration=given if signal == "activations" else None,
            ).num_slots
        )
        for similarity, signal in CHOICES
    }
    assert counts["cosine", "weights"] == counts["cosine", "activations"] == 4 * 8
    assert counts["cka", "weights"] < 4 * 8


# -- alignment -------------------------------------------------------------------------------------


def shuffle(tensors: dict[str, Tensor]) -> None:
    """Put the neurons of every expert into an order of its own."""
    generator = torch.Generator().manual_seed(0)
    shuffles = 0
    for name, gate in tensors.items():
        match = re.fullmatch(r"(.*\.experts\.\d+\.)w1\.weight", name)
        if match is None:
            continue
        order_I = torch.randperm(len(gate), generator=generator)
        for matrix in ("w1", "w3"):
            tensors[f"{match[1]}{matrix}.weight"] = tensors[f"{match[1]}{matrix}.weight"][order_I]
        tensors[f"{match[1]}w2.weight"] = tensors[f"{match[1]}w2.weight"][:, order_I]
        shuffles += 1
    assert shuffles >= 8


@pytest.mark.slow
def test_a_shuffled_variant_aligned_merges_as_well_as_the_original(
    two: Folders, given: dict[str, list[Path]], tmp_path: Path
) -> None:
    shuffled = tmp_path / "shuffled"
    shutil.copytree(two["math"], shuffled)
    tensors = load_file(two["math"] / "model.safetensors")
    shuffle(tensors)
    (shuffled / "model.safetensors").unlink()
    save_shards(shuffled, tensors, 0)
    own = original_loss(two["math"], "math")

    def merged(label: str, folder: Path, *, align: bool) -> float:
        result = consolidate(
            two | {"math": folder},
            tmp_path / label,
            signal="activations",
            align=align,
            code="plain",
            calibration=given,
        )
        assert result.plan.recipe.alignment == ("neurons" if align else "none")
        assert result.plan.num_slots == (8, 8, 8, 8)
        return loss(result.pack, "math") - own

    original = merged("original", two["math"], align=False)
    assert merged("aligned", shuffled, align=True) == pytest.approx(original, abs=0.002)
    # The same slots without alignment: the mean of two orders is neither.
    assert merged("worse", shuffled, align=False) > 0.5 + original


def test_a_shuffled_variant_aligned_costs_what_the_original_does(
    make_checkpoint: MakeCheckpoint, given: dict[str, list[Path]]
) -> None:
    """Under a budget: calibration goes with the neurons, into costs, codes and measured losses."""
    config = TINY_CONFIG | {"num_local_experts": 8}
    first, noise = random_tensors(config, seed=0), random_tensors(config, seed=1)
    first["lm_head.weight"] *= 8  # so that it is not indifferent
    second = {name: (tensor + 0.1 * noise[name]).bfloat16() for name, tensor in first.items()}
    folders = [
        make_checkpoint(name, config=config, tensors=tensors, edit=edit)
        for name, tensors, edit in (
            ("base", first, None),
            ("math", second, None),
            ("shuffled", second, shuffle),
        )
    ]

    def predicted(folder: Path, *, align: bool) -> list[float]:
        models = {"base": folders[0], "math": folder}
        plan = make_plan(
            models, budget="0.3x", signal="activations", align=align, calibration=given
        )
        assert plan.num_slots == (8, 8)
        assert plan.prediction is not None
        return [*plan.prediction.losses.values()]

    original = predicted(folders[1], align=False)
    aligned = predicted(folders[2], align=True)
    assert aligned == pytest.approx(original, rel=0.05)
    assert max(predicted(folders[2], align=False)) > 5 * max(original)


# -- choices that make no sense --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--similarity", "l2"], "similarity 'l2' is unknown; known: cosine, cka"),
        (["--signal", "x"], "signal 'x' is unknown; known: weights, activations"),
        (["--align", "--threshold", "1.0"], "alignment reorders neurons, and a lossless pack"),
        (["--threshold", "1.0", "--similarity", "cka"], "there is nothing that another similarity"),
        (["--threshold", "1.0", "--signal", "activations"], "there is nothing that another"),
        (["--merge", "ties", "--calibration", "base=x"], "nothing of this pack depends on calib"),
        (["--threshold", "1.0", "--calibration", "base=x"], "nothing of this pack depends on"),
        *(
            (["--plan", "plan.json", *options], "--plan has every choice in it")
            for options in (
                ["--threshold", "0.9"],
                ["--align"],
                ["--similarity", "cosine"],
                ["--signal", "weights"],
                ["--merge", "ties"],
            )
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_contradictions_are_one_line(
    two: Folders,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    complaint: str,
) -> None:
    named = [f"{name}={folder}" for name, folder in two.items()]
    options = [option.replace("base=x", f"base={tmp_path}") for option in options]
    if f"base={tmp_path}" in options:
        options += ["--calibration", f"math={tmp_path}"]
    with pytest.raises(SystemExit) as end:
        main(["consolidate", *named, "-q", "-o", str(tmp_path / "pack"), *options])
    assert end.value.code == UsageError.exit_code
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "pack").exists()


def test_text_that_a_plan_has_no_use_for_is_refused(
    two: Folders, given: dict[str, list[Path]], tmp_path: Path
) -> None:
    plan = make_plan(two)
    with pytest.raises(UsageError, match="made without calibration text; leave --calibration out"):
        consolidate(two, tmp_path / "pack", plan=plan, calibration=given)

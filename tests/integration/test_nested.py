"""Nested packs: what they lose, what they take, and that every way to read one agrees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import TINY_CONFIG, MakeCheckpoint, random_tensors, save_shards, tree_digests
from moeconsolidate import consolidate, export_variant, texts, writer
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.cli import main
from moeconsolidate.coded_layer import CodedLayer
from moeconsolidate.compensation import Compensation
from moeconsolidate.evaluation import score_texts
from moeconsolidate.original import CheckpointSource
from moeconsolidate.pipeline import make_plan
from moeconsolidate.plan import ConsolidationPlan
from moeconsolidate.report import summarise
from moeruntime import Engine, Pack, Request, SamplingParams, verify_pack
from moeruntime.errors import IntegrityError, UsageError
from moeruntime.pack.manifest import MANIFEST_NAME, Manifest
from moeruntime.tensorfile import DTYPES
from runtime_fixtures import (
    TEXTS_OF,
    engine_logits,
    load_reference,
    reference_logits,
    relative_error,
)
from runtime_fixtures import texts as documents

Folders = dict[str, Path]
Document = dict[str, Any]
CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
LITTLE = {
    "NUM_WINDOWS": 2,
    "NUM_HELD_OUT": 1,
    "NUM_SAMPLED_WINDOWS": 2,
    "NUM_SAMPLED_HELD_OUT": 1,
    "WINDOW_TOKENS": 32,
}
IDS = [1, *range(300, 340), 7, 7, 2000, 4095, 5]


@pytest.fixture(scope="module")
def models(checkpoints: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Three very small variants whose experts differ a little, each by a degree of its own."""
    config = TINY_CONFIG | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": 8,
        "num_local_experts": 8,
        "initializer_range": 0.1,
    }
    first = random_tensors(config, seed=0)
    root = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("base", "math", "shell")):
        noise = random_tensors(config, seed=number)
        tensors = {
            key: (tensor.float() + (0.02 + 0.04 * (len(key) % 3)) * noise[key].float()).bfloat16()
            if number and ".experts." in key
            else noise[key]
            for key, tensor in first.items()
        }
        tensors["lm_head.weight"] = tensors["lm_head.weight"] * 32  # so that it is sure of things
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
        save_shards(root / name, tensors, 0)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(checkpoints["base"] / file, root / name)
    return {name: root / name for name in ("base", "math", "shell")}


@pytest.fixture(scope="module")
def two(models: Folders) -> Folders:
    return {name: models[name] for name in ("base", "math")}


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrate on so little that it takes a second."""
    for name, value in LITTLE.items():
        monkeypatch.setattr(texts, name, value)


@pytest.fixture(scope="module")
def small_pack(two: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants under a budget that leaves some experts more private bits than others."""
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        for name, value in LITTLE.items():
            context.setattr(texts, name, value)
        out = tmp_path_factory.mktemp("nested") / "pack"
        return consolidate(two, out, budget="0.25x").pack


# -- quality ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_default_pack_loses_next_to_nothing(
    pack: Path, merged_pack: Path, checkpoints: Folders
) -> None:
    losses: dict[str, dict[str, float]] = {}
    for label, root in (("nested", pack), ("merged", merged_pack)):
        with Engine.from_pack(root, **CPU) as engine:
            losses[label] = {
                name: score_texts(engine, name, documents(TEXTS_OF[name]), max_windows=8).nll
                for name in checkpoints
            }
    increase: dict[str, list[float]] = {"nested": [], "merged": []}
    for name, folder in checkpoints.items():
        with Engine(CheckpointSource(Checkpoint(name, folder)), **CPU) as engine:
            own = score_texts(engine, name, documents(TEXTS_OF[name]), max_windows=8).nll
        for label, found in increase.items():
            found.append(losses[label][name] - own)
    assert max(map(abs, increase["nested"])) < 0.01
    assert max(increase["nested"]) < max(increase["merged"]) / 10


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("little_text")
@pytest.mark.parametrize("budget", ["0.2x", "70000B"])
def test_a_budget_is_met_to_the_byte(two: Folders, tmp_path: Path, budget: str) -> None:
    result = consolidate(two, tmp_path / "pack", budget=budget)
    with Pack(result.pack) as opened:
        summary = summarise(opened)
        config = opened.manifest.config
    wanted = result.plan.recipe.budget_bytes
    assert wanted is not None and result.plan.prediction is not None
    assert 0.93 * wanted < summary.expert_bytes <= wanted
    assert summary.expert_bytes == result.manifest.coded_bytes()
    # What is predicted are tensors, and a byte for each matrix' code and each member's.
    num_units = 2 * sum(result.manifest.num_slots)
    num_members = 2 * 2 * config.num_layers * config.num_experts
    assert result.plan.prediction.expert_bytes == summary.expert_bytes + num_units + num_members
    if budget == "0.2x":
        assert summary.expert_ratio <= 0.2
        assert wanted == int(0.2 * summary.separate_expert_bytes)
    assert set(result.plan.recipe.texts) == set(two)
    assert result.plan.recipe.calibration == "self"


@pytest.mark.usefixtures("little_text")
def test_a_budget_is_met_where_columns_do_not_fill_words(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    models = [make_checkpoint("a", seed=1), make_checkpoint("b", seed=2)]
    result = consolidate(models, tmp_path / "pack", threshold=0.0, budget="0.4x")
    with Pack(result.pack) as opened:
        assert 0 < summarise(opened).expert_bytes <= (result.plan.recipe.budget_bytes or 0)


@pytest.mark.usefixtures("little_text")
@pytest.mark.parametrize("shared_bits", [2, 3, 5])
def test_fewer_or_more_bits_may_be_shared(two: Folders, tmp_path: Path, shared_bits: int) -> None:
    """Unshared experts, too, come below what 4 bits each would take."""
    result = consolidate(
        two, tmp_path / "pack", threshold=1.0, code="nested", budget="0.4x", shared_bits=shared_bits
    )
    nested = verify_pack(result.pack).nested
    assert nested is not None
    assert {code.shared_bits for code in nested.values()} == {shared_bits}
    assert result.plan.num_slots == (16, 16)
    assert result.manifest.coded_bytes() <= (result.plan.recipe.budget_bytes or 0)
    again = ConsolidationPlan.from_bytes(json.dumps(result.plan.to_json()).encode(), "plan.json")
    planned = consolidate(two, tmp_path / "planned", plan=again)
    assert tree_digests(planned.pack) == tree_digests(result.pack)


def test_the_default_codes_follow_the_shared_bits(two: Folders, tmp_path: Path) -> None:
    errors = []
    for shared_bits in (2, 3, 4):
        out = tmp_path / str(shared_bits)
        consolidate(two, out, shared_bits=shared_bits)
        with Pack(out) as opened, Checkpoint("math", two["math"]) as checkpoint:
            row_P = torch.empty(checkpoint.config.expert_numel, dtype=checkpoint.expert_dtype)
            checkpoint.read_expert(1, 3, out=row_P)
            found = [
                opened.read_expert("math", 1, 3, part).flatten() for part in ("gate_up", "down")
            ]
            errors.append(float((torch.cat(found).float() - row_P.float()).norm()))
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]


def test_a_calibrated_pack_tells_how_experts_were_used(small_pack: Path) -> None:
    manifest = verify_pack(small_pack)
    routing = manifest.provenance["routing"]
    assert set(routing) == set(manifest.variant_names)
    for table in routing.values():
        assert [len(row) for row in table] == [8] * manifest.config.num_layers
        # Of ten thousand tokens, each goes to top_k experts.
        for row in table:
            assert sum(row) == pytest.approx(10_000 * manifest.config.top_k, abs=8)
    assert routing["base"] != routing["math"]


@pytest.mark.usefixtures("little_text")
def test_routing_is_told_only_where_it_is_known_and_short(
    two: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "routing" not in consolidate(two, tmp_path / "default").manifest.provenance
    monkeypatch.setattr(writer, "MAX_ROUTING", 2 * 2 * 8 - 1)
    budgeted = consolidate(two, tmp_path / "budget", budget="0.25x").manifest
    assert "routing" not in budgeted.provenance


@pytest.mark.usefixtures("little_text")
def test_a_loss_is_predicted_and_met(two: Folders, tmp_path: Path) -> None:
    loose = consolidate(two, tmp_path / "loose", max_loss=0.02)
    assert loose.plan.prediction is not None
    wanted = max(loose.plan.prediction.losses.values()) / 20
    tight = consolidate(two, tmp_path / "tight", max_loss=wanted)
    assert tight.plan.prediction is not None
    assert 0 < max(tight.plan.prediction.losses.values()) <= wanted
    assert loose.manifest.coded_bytes() < tight.manifest.coded_bytes()


# -- plans -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("little_text")
@pytest.mark.parametrize("calibrated", [False, True], ids=["self", "text"])
def test_a_plan_is_executed_exactly(two: Folders, tmp_path: Path, calibrated: bool) -> None:
    data = Path(__file__).resolve().parents[2] / "examples" / "data"
    calibration = (
        {"base": [data / "english.jsonl"], "math": [data / "math.jsonl", data / "english.jsonl"]}
        if calibrated
        else None
    )
    plan = make_plan(two, budget="0.22x", calibration=calibration)
    again = ConsolidationPlan.from_bytes(json.dumps(plan.to_json()).encode(), "plan.json")
    assert again == plan
    direct = consolidate(two, tmp_path / "direct", budget="0.22x", calibration=calibration)
    planned = consolidate(two, tmp_path / "planned", plan=again, calibration=calibration)
    assert tree_digests(planned.pack) == tree_digests(direct.pack)
    assert planned.plan == direct.plan == plan
    assert verify_pack(planned.pack).recipe["calibration"] == ("text" if calibrated else "self")


@pytest.mark.usefixtures("little_text")
def test_plans_of_other_models_are_refused(two: Folders, models: Folders, tmp_path: Path) -> None:
    plan = make_plan(two, budget="0.22x")
    with pytest.raises(UsageError, match=r"plan.*16 experts, the models 24"):
        consolidate(models, tmp_path / "pack", plan=plan)
    others = {"base": models["base"], "math": models["shell"]}
    with pytest.raises(UsageError, match="'math': the plan was made with other calibration text"):
        consolidate(others, tmp_path / "pack", plan=plan)
    assert list(tmp_path.iterdir()) == []


# -- the same bytes --------------------------------------------------------------------------------


@pytest.mark.usefixtures("little_text")
def test_threads_do_not_change_a_budgeted_pack(two: Folders, tmp_path: Path) -> None:
    """Only one thread decides bytes, however many there are."""
    before = torch.get_num_threads()
    packs = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = tmp_path / str(threads)
            packs.append(tree_digests(consolidate(two, out, budget="0.25x").pack))
    finally:
        torch.set_num_threads(before)
    assert packs[0] == packs[1]


# -- what earlier layers lost ----------------------------------------------------------------------


@pytest.mark.usefixtures("little_text")
def test_each_layer_is_corrected_with_what_will_be_decoded(
    two: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(two, budget="0.25x")
    seen: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    halves: dict[tuple[int, int, int], torch.Tensor] = {}
    correct, advance = Compensation.correct, Compensation.advance

    def spy_correct(self: Compensation, layer: int, rows: torch.Tensor, coded: CodedLayer) -> None:
        for variant in range(2):
            matrices = coded.weights(variant, "gate_up")
            halves.update({(layer, variant, idx): one for idx, one in enumerate(matrices)})
        correct(self, layer, rows, coded)

    def spy_advance(self: Compensation, layer: int, coded: CodedLayer) -> None:
        for variant in range(2):
            experts = coded.experts(variant)
            seen.update({(layer, variant, idx): one for idx, one in enumerate(experts)})
        advance(self, layer, coded)

    monkeypatch.setattr(Compensation, "correct", spy_correct)
    monkeypatch.setattr(Compensation, "advance", spy_advance)
    corrected = consolidate(two, tmp_path / "corrected", plan=plan).pack
    assert len(seen) == len(halves) == 2 * 2 * 8
    with Pack(corrected) as opened:
        names = opened.manifest.variant_names
        for place, (gate_up, down) in seen.items():
            layer, variant, expert = place
            assert torch.equal(halves[place], gate_up)
            for part, found in (("gate_up", gate_up), ("down", down)):
                stored = opened.read_expert(names[variant], layer, expert, part)
                assert torch.equal(found.bfloat16(), stored), (place, part)
    monkeypatch.setattr(Compensation, "correct", lambda *_: None)
    as_it_is = consolidate(two, tmp_path / "as-it-is", plan=plan).pack
    assert tree_digests(corrected) != tree_digests(as_it_is)


# -- every way to read one -------------------------------------------------------------------------


def test_some_have_private_bits_and_some_have_none(small_pack: Path) -> None:
    """Or the tests below would prove little."""
    manifest = verify_pack(small_pack)
    bits = {
        code.bits
        for variant in manifest.variants
        for layer in variant.private_codes
        for codes in layer
        for code in codes
    }
    assert len(bits) > 2


def test_the_engine_says_what_transformers_says_of_the_export(
    small_pack: Path, tmp_path: Path
) -> None:
    """An export rounds weights to bf16, so the same engine reads it too."""
    for name in ("base", "math"):
        folder = export_variant(small_pack, name, tmp_path / name)
        with Engine.from_pack(small_pack, **CPU) as engine:
            nested_TV = engine_logits(engine, name, IDS, [len(IDS)])
            pieces_TV = engine_logits(engine, name, IDS, [5, 1, 1, len(IDS) - 7])
        with Engine(CheckpointSource(Checkpoint(name, folder)), **CPU) as engine:
            exported_TV = engine_logits(engine, name, IDS, [len(IDS)])
        oracle_TV = reference_logits(load_reference(folder), IDS)
        assert relative_error(exported_TV, oracle_TV) < 1e-4
        assert relative_error(pieces_TV, nested_TV) < 1e-4
        assert relative_error(nested_TV, oracle_TV) < 0.02
        assert relative_error(nested_TV, oracle_TV) > 0  # the pack's weights are finer than bf16


def test_an_export_holds_what_the_pack_decodes(small_pack: Path, tmp_path: Path) -> None:
    folder = export_variant(small_pack, "math", tmp_path / "math")
    with Pack(small_pack) as opened, Checkpoint("math", folder) as exported:
        config, dtype = opened.manifest.config, DTYPES[opened.manifest.expert_dtype]
        row_P = torch.empty(config.expert_numel, dtype=dtype)
        for layer in range(config.num_layers):
            for number in range(config.num_experts):
                exported.read_expert(layer, number, out=row_P)
                parts = [
                    opened.read_expert("math", layer, number, part) for part in ("gate_up", "down")
                ]
                assert torch.equal(torch.cat([part.flatten() for part in parts]), row_P)


def test_a_nested_pack_at_threshold_one_can_be_exported(two: Folders, tmp_path: Path) -> None:
    """Nothing is merged, but codes round: the digest of what went in says nothing of it."""
    result = consolidate(two, tmp_path / "pack", threshold=1.0, code="nested")
    assert result.manifest.num_slots == (16,) * 2
    export_variant(result.pack, "math", tmp_path / "math")


@pytest.mark.parametrize("resident", [1, 2])
def test_mixed_batches_equal_solo_runs(small_pack: Path, resident: int) -> None:
    params = SamplingParams(max_tokens=12)
    prompts = ("Tom has 3 apples", "The president said", "def f(x):")
    requests = [Request(name, text, params) for text in prompts for name in ("base", "math")]
    with Engine.from_pack(small_pack, **CPU) as engine:
        solo = [engine.generate([request])[0].token_ids for request in requests]
    with Engine.from_pack(small_pack, **CPU, resident=resident) as engine:
        together = [output.token_ids for output in engine.generate(requests)]
    assert together == solo
    assert len(set(map(tuple, solo))) > 3


def test_faces_decoded_lately_are_a_matter_of_speed(
    small_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeruntime import memory

    with Engine.from_pack(small_pack, **CPU) as engine:
        kept_TV = engine_logits(engine, "math", IDS, [len(IDS)])
    for num_bytes in (0, 20_000):  # nothing, and little more than one expert's
        monkeypatch.setattr(memory, "DECODED_BYTES", num_bytes)
        with Engine.from_pack(small_pack, **CPU) as engine:
            assert engine.memory.decoded_bytes == num_bytes
            assert torch.equal(engine_logits(engine, "math", IDS, [len(IDS)]), kept_TV)


def test_memory_is_predicted_from_the_codes(small_pack: Path) -> None:
    with Engine.from_pack(small_pack, **CPU) as engine, Pack(small_pack) as opened:
        assert engine.memory.experts_bytes == opened.bytes_by_part()["experts"]


# -- damage and lies -------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_private_file_is_found(small_pack: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pack"
    shutil.copytree(small_pack, copy)
    path = sorted((copy / "private" / "math").iterdir())[-1]
    contents = bytearray(path.read_bytes())
    contents[-3] ^= 0x10
    path.write_bytes(contents)
    with pytest.raises(IntegrityError, match=rf"private/math/{path.name}: sha256"):
        verify_pack(copy)


def put(*path: str | int, value: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    change.__name__ = f"{'.'.join(map(str, path))}={str(value)[:30]}"
    return change


def drop(*path: str | int) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    change.__name__ = f"without {'.'.join(map(str, path))}"
    return change


CODES = ("variants", 1, "private_codes")
PRIVATE = "private/math/layer-001.safetensors"


def private_bits_that_are_not_there(document: Document) -> None:
    for pair in document["variants"][1]["private_codes"][1]:
        pair[0] = [4, 1]
        pair[1] = [4, 1]


def no_private_bits(document: Document) -> None:
    document["variants"][1]["private_codes"][1] = [[[0, 0], [0, 0]]] * 8


def one_layer_more(document: Document) -> None:
    document["variants"][1]["private_codes"].append([[[0, 0], [0, 0]]] * 8)


LIES: list[tuple[Callable[[Document], None], str]] = [
    # Against itself.
    (drop("nested"), "private_codes has 2 layers"),
    (put("nested", value=None), "private_codes has 2 layers"),
    (put("nested", value=[]), "must be a JSON object"),
    (put("nested", "surprise", value={}), "unknown field 'surprise'"),
    (drop("nested", "down"), "field 'down' is missing"),
    (put("nested", "down", value=None), "must be a JSON object"),
    (drop("nested", "down", "group"), "field 'group' is missing"),
    (put("nested", "down", "surprise", value=1), "unknown field 'surprise'"),
    (put("nested", "down", "shared_bits", value=1), "field 'shared_bits' is 1, outside 2..6"),
    (put("nested", "down", "shared_bits", value=7), "field 'shared_bits' is 7, outside 2..6"),
    (put("nested", "down", "shared_bits", value=4.0), "must be an integer"),
    (put("nested", "down", "shared_bits", value=True), "must be an integer"),
    (put("nested", "down", "group", value=7), "field 'group' is 7"),
    (put("nested", "down", "group", value=2**21), "field 'group' is 2097152"),
    (drop(*CODES), "private_codes has 0 layers"),
    (put(*CODES, value=None), "private_codes has 0 layers"),
    (put(*CODES, value=[]), "private_codes has 0 layers"),
    (put(*CODES, value={}), "field 'private_codes' must be a list"),
    (drop(*CODES, 0), "private_codes has 1 layers"),
    (one_layer_more, "private_codes has 3 layers"),
    (put(*CODES, 0, value=7), "private_codes[0]: must list 8 experts"),
    (drop(*CODES, 1, 3), "private_codes[1]: must list 8 experts"),
    (put(*CODES, 1, 3, value=None), "private_codes[1][3]: field 'codes' must be a list"),
    (put(*CODES, 1, 3, value=[[0, 0]]), "must hold one [bits, step] for each of gate_up, down"),
    (put(*CODES, 1, 3, value=[[0, 0]] * 3), "must hold one [bits, step]"),
    (put(*CODES, 1, 3, 0, value=[1]), "[1] is not a private code"),
    (put(*CODES, 1, 3, 0, value=[1, 4, 0]), "[1, 4, 0] is not a private code"),
    (put(*CODES, 1, 3, 0, value=[0, 1]), "[0, 1] is not a private code"),
    (put(*CODES, 1, 3, 0, value=[1, 0]), "[1, 0] is not a private code"),
    (put(*CODES, 1, 3, 0, value=[5, 1]), "[5, 1] is not a private code"),
    (put(*CODES, 1, 3, 0, value=[4, 9]), "[4, 9] is not a private code"),
    (put(*CODES, 1, 3, 0, value=[-1, 0]), "not an integer in 0..127"),
    (put(*CODES, 1, 3, 0, value=[1, 128]), "not an integer in 0..127"),
    (put(*CODES, 1, 3, 0, value=[True, 4]), "not an integer in 0..127"),
    (put(*CODES, 1, 3, 0, value=["1", "4"]), "not an integer in 0..127"),
    (put(*CODES, 1, 3, 0, value="14"), "must be a list"),
    # Against the headers of the files.
    (put("nested", "gate_up", "shared_bits", value=5), "'gate_up.1' is missing or unknown"),
    (put("nested", "gate_up", "shared_bits", value=2), "is missing or unknown"),
    (put("nested", "down", "group", value=64), "down.scale: shape"),
    (private_bits_that_are_not_there, "is missing or unknown"),
    (no_private_bits, "private codes that no variant uses"),
    (drop("files", PRIVATE), "layer-001.safetensors: missing, but the manifest needs it"),
]


@pytest.mark.parametrize(("change", "complaint"), LIES, ids=[change.__name__ for change, _ in LIES])
def test_every_lie_about_codes_is_found(
    small_pack: Path, tmp_path: Path, change: Callable[[Document], None], complaint: str
) -> None:
    copy = tmp_path / "pack"
    shutil.copytree(small_pack, copy, copy_function=lambda old, new: Path(new).hardlink_to(old))
    document = json.loads((copy / MANIFEST_NAME).read_bytes())
    change(document)
    (copy / MANIFEST_NAME).unlink()
    (copy / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(IntegrityError) as caught:
        Pack(copy)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_private_codes_in_a_plain_pack_are_a_lie(merged_pack: Path, tmp_path: Path) -> None:
    document = json.loads((merged_pack / MANIFEST_NAME).read_bytes())
    assert document["nested"] is None
    document["variants"][0]["private_codes"] = [[[[0, 0], [0, 0]]] * 8] * 4
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match="private_codes has 4 layers"):
        Manifest.load(tmp_path)


def test_a_pack_of_version_0_1_is_read(lossless_pack: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pack"
    shutil.copytree(lossless_pack, copy)
    document = json.loads((copy / MANIFEST_NAME).read_bytes())
    document["format_version"] = "0.1"
    del document["nested"]
    for variant in document["variants"]:
        del variant["private_codes"]
    (copy / MANIFEST_NAME).write_text(json.dumps(document))
    assert verify_pack(copy).nested is None
    with Engine.from_pack(copy, **CPU) as old, Engine.from_pack(lossless_pack, **CPU) as new:
        logits = [engine_logits(engine, "shell", IDS, [len(IDS)]) for engine in (old, new)]
    assert torch.equal(*logits)


def test_nested_codes_of_version_0_2_are_refused(pack: Path, tmp_path: Path) -> None:
    document = json.loads((pack / MANIFEST_NAME).read_bytes())
    document["format_version"] = "0.2"
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match="another order of bits; recompile"):
        Manifest.load(tmp_path)


# -- one clear line --------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith("moec: error: ")
    assert "Traceback" not in captured.err
    assert isinstance(end.value.code, int)
    return end.value.code, line


@pytest.mark.usefixtures("little_text")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--budget", "0.05x"], "is too small: without any private bits the experts take"),
        (["--budget", "1B"], "is too small"),
        (["--budget", "0x"], "budget of 0 bytes is outside 1.."),
        (["--budget", "much"], "neither a part, such as 0.25x, nor bytes, such as 60GB"),
        (["--budget", "-1x"], "neither a part"),
        (["--max-loss", "1e-9"], "is out of reach: with the most bits the predicted loss is"),
        (["--max-loss", "0"], "outside 0..100 nats"),
        (["--max-loss", "nan"], "outside 0..100 nats"),
        (["--max-loss", "0.1", "--budget", "0.2x"], "not both"),
        (["--budget", "0.2x", "--code", "plain"], "which only nested codes have"),
        (["--code", "zip"], "code 'zip' is unknown; known: nested, plain"),
        (["--shared-bits", "7"], "7 shared bits are outside 2..6"),
        (["--shared-bits", "3", "--code", "plain"], "this pack stores plain experts"),
        (["--shared-bits", "3", "--plan", "plan.json"], "--plan has every choice in it"),
        (["--calibration", "maths=x.jsonl"], "calibration for 'maths', which is no variant"),
        (["--calibration", "math=x.jsonl"], "for some variants, but not for base"),
        (["--calibration", "math"], "--calibration 'math' is not NAME=PATH"),
        (["--plan", "plan.json", "--budget", "0.2x"], "--plan has every choice in it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_choices_that_make_no_sense(
    two: Folders,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    complaint: str,
) -> None:
    named = [f"{name}={folder}" for name, folder in two.items()]
    code, line = fails(capsys, "consolidate", *named, "-q", "-o", tmp_path / "pack", *options)
    assert code == UsageError.exit_code
    assert complaint in line
    assert list(tmp_path.iterdir()) == []


def test_calibration_text_that_is_bad(
    two: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [f"{name}={folder}" for name, folder in two.items()]
    text = tmp_path / "text.jsonl"
    options = [f"--calibration={name}={text}" for name in two]
    for contents, complaint in (
        (None, "no such file"),
        ("", "holds no text"),
        ('{"text": "short"}\n', "tokens of text; calibration needs 256"),
        ('{"txt": 1}\n', "text.jsonl:1: field 'text' is missing"),
    ):
        if contents is not None:
            text.write_text(contents)
        arguments = ["consolidate", *named, "-q", "-o", tmp_path / "pack", *options]
        code, line = fails(capsys, *arguments)
        assert code == 3
        assert complaint in line


@pytest.mark.usefixtures("little_text")
def test_plans_on_the_command_line(
    two: Folders, models: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [f"{name}={folder}" for name, folder in two.items()]
    data = Path(__file__).resolve().parents[2] / "examples" / "data"
    plan, out = tmp_path / "plan.json", tmp_path / "pack"
    given = [f"--calibration={name}={data / TEXTS_OF[name]}.jsonl" for name in two]
    with pytest.raises(SystemExit) as end:
        main(["plan", *named, *given, "--budget", "0.3x", "-q", "-o", str(plan)])
    assert end.value.code in (None, 0)
    assert "0.3" in capsys.readouterr().out or plan.exists()
    for arguments, complaint in (
        ([*named], "give the same --calibration"),
        ([*named, given[0]], "calibration text is given for some variants, but not for math"),
        ([*named, given[0], f"--calibration=x={data}"], "'x', which is no variant"),
        ([*named, given[0], given[0].replace("base=", "math=")], "other calibration text"),
        ([*named, f"shell={models['shell']}", *given], "16 experts, the models 24"),
    ):
        code, line = fails(capsys, "consolidate", *arguments, "--plan", plan, "-q", "-o", out)
        assert code == UsageError.exit_code, line
        assert complaint in line
    document = json.loads(plan.read_bytes())
    document["layers"][0]["codes"][0][0] = [[1, 4], [1], [1, 4]]
    plan.write_text(json.dumps(document))
    code, line = fails(capsys, "consolidate", *named, *given, "--plan", plan, "-q", "-o", out)
    assert code == 3
    assert "two pairs [bits, step]" in line
    assert not out.exists()

"""consolidate(): from checkpoint folders to a pack. The whole story; the stages are next door.

    sources -> checkpoints -> plan: compare, cluster, calibrate, allocate bits
            -> one layer at a time: read, merge or code, write -> the rest -> manifest

The plan comes first only where a budget has to be divided over all layers. Otherwise each layer is
planned when it is read, and every expert is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from os import PathLike
from pathlib import Path

from torch import Tensor

from moeconsolidate import encoding, similarity
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.coding import code_layer, nested_format
from moeconsolidate.compatibility import check_compatible, warn_of_different_bases
from moeconsolidate.compensation import Compensation
from moeconsolidate.importance import Statistics
from moeconsolidate.journal import layer_key
from moeconsolidate.layers import LayerReader
from moeconsolidate.merging import MERGE_RULES, MergeRule, SlotContext
from moeconsolidate.plan import (
    ConsolidationPlan,
    LayerPlan,
    OnProgress,
    Origin,
    Progress,
    Recipe,
)
from moeconsolidate.planning import (
    calibrate,
    check_plan,
    plan_layers,
    resolve_recipe,
    with_default_codes,
)
from moeconsolidate.publish import check_target, require_disk
from moeconsolidate.sources import Models, parse_sources
from moeconsolidate.threads import Behind, num_places, side_by_side, single_threaded_torch
from moeconsolidate.writer import PackWriter, SlotColumns
from moeruntime.families import ModelConfig
from moeruntime.hostmemory import new_tensor
from moeruntime.pack import Manifest

__all__ = ["ConsolidationResult", "consolidate", "make_plan"]


@dataclass(frozen=True, slots=True)
class ConsolidationResult:
    """A finished pack: where it is, what shares what in it, and its manifest."""

    pack: Path
    plan: ConsolidationPlan
    manifest: Manifest


def consolidate(
    models: Models,
    out: str | PathLike[str],
    *,
    threshold: float | None = None,
    similarity: str | None = None,
    signal: str | None = None,
    align: bool = False,
    merge: str | None = None,
    code: str | None = None,
    shared_bits: int | None = None,
    budget: str | None = None,
    max_loss: float | None = None,
    calibration: Mapping[str, Sequence[Path]] | None = None,
    plan: ConsolidationPlan | None = None,
    on_progress: OnProgress | None = None,
) -> ConsolidationResult:
    """Compile checkpoints of one architecture into a pack.

    Args:
        models: `[NAME=]FOLDER` for each variant, or a mapping of names to folders; at least two.
        out: where the pack is to appear; nothing may be there yet.
        threshold: similarity, in [0, 1], from which experts share a slot; 1.0 shares bit-identical
            experts only. None is 0.9.
        similarity: "cosine" or "cka", as `moeconsolidate.similarity` defines them; None is cosine.
        signal: "weights" or "activations", as `moeconsolidate.signals` defines them; None is
            weights, or activations where `align` is set.
        align: whether to bring the neurons of a slot's members into one order first, for variants
            that have no ancestor in common.
        merge: the rule that makes one plain expert of a slot's members; None is "average".
        code: "nested" or "plain"; None is plain where a merge rule is given and at threshold 1.0,
            which loses nothing, and nested otherwise.
        shared_bits: of nested codes, 2 to 6; None is 4.
        budget: bytes that experts may take, such as "60GB", or "0.25x" of separate models'.
        max_loss: instead of a budget, the predicted loss of the worst variant, nats per token.
        calibration: variant -> JSONL files of its text. Where some is needed and none is given, the
            variants' own sampled text takes its place.
        plan: executed as it is, instead of all of the above but `calibration`.
        on_progress: called after each step.

    Raises:
        UsageError: the arguments make no sense, or `out` exists.
        CheckpointError, TokenizerError: a model is bad, or does not fit the others.
        ResourceError: memory or disk do not suffice.
    """
    target, texts = Path(out), calibration or {}
    report = on_progress or (lambda progress: None)
    with _opened(models, target, report) as checkpoints, ExitStack() as stack:
        config, dtype = checkpoints[0].config, checkpoints[0].expert_dtype
        if plan is None:
            recipe = resolve_recipe(
                checkpoints,
                threshold=threshold,
                similarity=similarity,
                signal=signal,
                align=align,
                merge=merge,
                code=code,
                shared_bits=shared_bits,
                budget=budget,
                max_loss=max_loss,
                texts=texts,
            )
        else:
            check_plan(plan, checkpoints)
            recipe = plan.recipe
        learned = calibrate(checkpoints, recipe, texts, report)
        if learned.statistics is not None:  # from here on sums decide bits, and bits bytes
            stack.enter_context(single_threaded_torch())
        recipe = replace(recipe, texts=learned.texts)
        if plan is None and recipe.allocated:
            plan = plan_layers(checkpoints, recipe, learned, report)
        reader = LayerReader(checkpoints, recipe, learned.inputs)
        nested = nested_format(config, recipe.shared_bits) if recipe.code == "nested" else None
        names, family = [one.name for one in checkpoints], checkpoints[0].family.model_type
        if nested is not None:  # its pieces then run side by side, a thread each
            stack.enter_context(single_threaded_torch())
        loading = stack.enter_context(Behind())
        loading.do(partial(_load_libraries, recipe))
        with PackWriter.create(target, names, family, config, dtype) as writer:
            layers: list[LayerPlan] = []
            compensation, key = None, None
            if nested is not None and learned.statistics is not None:
                compensation = Compensation(checkpoints, learned.learned, learned.held_out)
            for layer in range(config.num_layers):
                planned = plan.layers[layer] if plan else None
                loaded = reader.load(layer)  # while the layer before is being flushed
                _settle(writer, report, layer, config.num_layers)
                loading.wait()
                key = layer_key(
                    layer,
                    names,
                    config,
                    recipe,
                    planned,
                    loaded,
                    learned.inputs[layer] if learned.inputs else None,
                    learned.statistics,
                    key if compensation else None,
                )
                if finished := writer.take_over(layer, key):
                    layers.append(finished)
                    if compensation and nested is not None:
                        compensation.advance(layer, writer.read_coded_layer(finished, nested))
                    continue
                shared = reader.decide(planned)
                if nested is not None and plan is None:
                    shared = with_default_codes(shared, recipe.shared_bits)
                layers.append(shared)
                statistics = learned.statistics and reader.aligned(learned.statistics)
                if nested is None:
                    # Identical ones need no sums, which might not keep the last bit of each.
                    rule = MERGE_RULES["first" if recipe.lossless else recipe.merge]
                    writer.write_layer(
                        shared, _merger(rule, shared, reader.experts_EP, config, statistics)
                    )
                else:
                    coded = code_layer(
                        shared,
                        reader.experts_EP,
                        config,
                        nested,
                        statistics,
                        num_variants=len(names),
                        correct_downs=partial(compensation.correct, layer, reader.experts_EP)
                        if compensation
                        else None,
                    )
                    if compensation:
                        compensation.advance(layer, coded)
                    writer.write_coded_layer(coded)
                    del coded  # the writer lets go of it once it is written
                writer.note_layer(key, recipe, shared)
            _settle(writer, report, config.num_layers, config.num_layers)
            _write_rest(checkpoints, writer, report, room=reader.release())
            prediction = plan.prediction if plan else None
            done = ConsolidationPlan(recipe, tuple(layers), prediction)
            manifest = writer.finish(
                done,
                [checkpoint.content_sha256() for checkpoint in checkpoints],
                separate_bytes=sum(checkpoint.num_bytes for checkpoint in checkpoints),
                nested=nested,
                routing=_routing(names, learned.statistics),
                origins={one.name: one.origin for one in checkpoints if one.origin},
            )
    return ConsolidationResult(target, done, manifest)


def make_plan(
    models: Models,
    *,
    threshold: float | None = None,
    similarity: str | None = None,
    signal: str | None = None,
    align: bool = False,
    merge: str | None = None,
    code: str | None = None,
    shared_bits: int | None = None,
    budget: str | None = None,
    max_loss: float | None = None,
    calibration: Mapping[str, Sequence[Path]] | None = None,
    on_progress: OnProgress | None = None,
) -> ConsolidationPlan:
    """Decide everything that `consolidate` would, and write nothing; arguments are its.

    `consolidate(..., plan=...)` executes the result.
    """
    texts = calibration or {}
    report = on_progress or (lambda progress: None)
    with _opened(models, None, report) as checkpoints, ExitStack() as stack:
        recipe = resolve_recipe(
            checkpoints,
            threshold=threshold,
            similarity=similarity,
            signal=signal,
            align=align,
            merge=merge,
            code=code,
            shared_bits=shared_bits,
            budget=budget,
            max_loss=max_loss,
            texts=texts,
        )
        learned = calibrate(checkpoints, recipe, texts, report)
        if learned.statistics is not None:  # from here on sums decide bits, and bits bytes
            stack.enter_context(single_threaded_torch())
        recipe = replace(recipe, texts=learned.texts)
        return plan_layers(checkpoints, recipe, learned, report)


@contextmanager
def _opened(models: Models, target: Path | None, report: OnProgress) -> Iterator[list[Checkpoint]]:
    """The checkpoints, open and compatible; and a target, if there is one, that can be made."""
    sources = parse_sources(models)
    folders = {one.name: one.origin for one in sources if isinstance(one.origin, Path)}
    origins: dict[str, Origin] = {}
    if target is not None:
        check_target(target, inputs=folders.values())
    if len(folders) < len(sources):
        from moeconsolidate.hub.obtain import obtain

        for name, model in obtain(sources, report).items():
            folders[name] = model.snapshot
            origins[name] = Origin(model.ref.repo, model.commit)
    with ExitStack() as stack:
        checkpoints = [
            stack.enter_context(Checkpoint(one.name, folders[one.name], origins.get(one.name)))
            for one in sources
        ]
        check_compatible(checkpoints)
        warn_of_different_bases(checkpoints)
        if target is not None:
            # What hardly any pack falls below; each layer's exact size is checked when it is due.
            require_disk(target.parent, checkpoints[0].num_bytes // 4)
        yield checkpoints


def _load_libraries(recipe: Recipe) -> None:
    """Load what the first layer needs once it has been read, while it is."""
    import moeconsolidate.clustering  # noqa: F401

    if not recipe.lossless:
        similarity.warm_up()
    if recipe.code == "nested":
        encoding.warm_up()


def _settle(writer: PackWriter, report: OnProgress, done: int, total: int) -> None:
    """Wait until so many layers are safe, and say so."""
    writer.settle()
    if done:
        report(Progress("experts", done, total))


def _write_rest(
    checkpoints: Sequence[Checkpoint], writer: PackWriter, report: OnProgress, *, room: int
) -> None:
    """Write what is not experts: other weights, and the small files of each variant.

    Where a tensor goes depends on who else has it, so all are read before any is written. What fits
    into so many bytes is kept meanwhile, the rest is read again.
    """
    roles = checkpoints[0].config.non_expert_shapes()
    pairs = [(idx, role) for idx in range(len(checkpoints)) for role in roles]
    ends = accumulate(checkpoints[idx].non_expert_num_bytes(role) for idx, role in pairs)
    fit = {pair for pair, end in zip(pairs, ends, strict=True) if end <= room}
    kept: dict[tuple[int, str], Tensor] = {}

    def read(pair: tuple[int, str]) -> None:
        tensor = checkpoints[pair[0]].read_non_expert(pair[1])
        if pair in fit:
            kept[pair] = tensor

    def once_more(idx: int, role: str) -> Tensor:
        tensor = kept.pop((idx, role), None)
        return checkpoints[idx].read_non_expert(role) if tensor is None else tensor

    with single_threaded_torch():
        side_by_side(read, pairs)
    digests = []
    for idx, checkpoint in enumerate(checkpoints):
        digests.append(checkpoint.non_expert_digests())
        writer.write_side_files(idx, checkpoint.side_files)
        report(Progress("other weights", idx + 1, len(checkpoints)))
    writer.write_non_expert(digests, once_more)
    for checkpoint in checkpoints:
        checkpoint.check_unchanged()


def _routing(
    names: Sequence[str], statistics: Sequence[Statistics] | None
) -> dict[str, list[list[int]]]:
    """How often calibration text was routed to each expert, of ten thousand tokens."""
    return {
        name: (one.num_routed_LE.double() * (10_000 / one.num_tokens)).round().int().tolist()
        for name, one in zip(names, statistics or (), strict=False)
    }


def _merger(
    rule: MergeRule,
    plan: LayerPlan,
    experts_EP: Tensor,
    config: ModelConfig,
    statistics: Sequence[Statistics] | None,
) -> SlotColumns:
    """Merge on demand, as the writer asks for runs of columns in the order of its file.

    A rule that needs whole experts has merged them all before; the result then stands in the place
    of a slot's first member, which no other slot has.
    """
    num_buffers = 1 if rule.whole_experts else num_places()
    merged_BP = new_tensor((num_buffers, experts_EP.shape[1]), experts_EP.dtype, experts_EP.device)
    members = [
        [experts_EP[ref.variant_idx * config.num_experts + ref.expert] for ref in slot]
        for slot in plan.slots
    ]
    contexts = [
        SlotContext(plan.layer, slot, refs, config, statistics)
        for slot, refs in enumerate(plan.slots)
    ]
    if rule.whole_experts:
        for rows, context in zip(members, contexts, strict=True):
            rows[0].copy_(rule(rows, context, out=merged_BP[0]))
        return lambda slot, columns, place: members[slot][0][columns]

    def merged(slot: int, columns: slice, place: int) -> Tensor:
        rows = [row_P[columns] for row_P in members[slot]]
        return rule(rows, contexts[slot], out=merged_BP[place, columns])

    return merged

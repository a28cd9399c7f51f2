"""What a capture would do and take, found out without weights: ``teacher-cache check RECIPE``."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from shared.cache import CacheReader
from shared.cache.layout import MANIFEST_NAME, PLAN_NAME, require_no_other_files
from shared.cache.storage import open_folder
from shared.capture.planning import CaptureData, identity_of
from shared.completeness import cache_covers, captured_splits
from shared.data.processing import ExampleProcessor
from shared.errors import RecipeError
from shared.models.chunks import chunk_positions
from shared.models.plans import plan_of
from shared.models.sharding import blocks
from shared.models.vlm import context_of, empty_vlm, load_config, split
from shared.places import is_local
from shared.preflight import (
    Report,
    describe_caches,
    describe_data,
    describe_quantization,
    describe_shape,
    describe_tokenizer,
    describe_unusable,
    is_made_later,
    require_head,
    require_model,
    require_training_recipe,
    require_writable,
    would_be_fetched,
)
from shared.recipes import Recipe
from shared.recipes.policies import Random, Threshold, TopK, TopP
from shared.runtime import default_device

GIB = 2**30
FP32_BYTES = 4
LOGITS_AT_ONCE = 4  # copies of a chunk's logits: the head's, fp32 log-probs, probabilities, one to work in
TENSORS_PER_LAYER = 8  # of (tokens, hidden), alive at once in a forward without a graph


def check_recipe(recipe: Recipe, *, num_ranks: int) -> Report:
    """Looks at everything that a capture by ``num_ranks`` processes would need; all problems at once."""
    report = Report()
    if recipe.teacher is None or recipe.cache is None:
        report.refuse(
            RecipeError("the recipe has no teacher and cache sections: there is nothing to capture")
        )
        return report
    processor = _describe_tokenizers(report, recipe)
    model = None
    with report.collecting():
        model = _describe_teacher(report, recipe, num_ranks=num_ranks)
    require_head(report, model, processor, what=f"teacher {recipe.teacher.model}")
    looked = describe_data(report, recipe, captured_splits(recipe), processor)
    describe_unusable(report, looked, recipe.data, what=recipe.data.source)
    context = None if model is None else context_of(model.config)
    for found in looked:
        with report.collecting():
            found.require_short(context, model=f"teacher {recipe.teacher.model}")
    with report.collecting():
        _describe_cache(report, recipe, processor)
    with report.collecting():
        _describe_writing(report, recipe)
    return report


def _describe_tokenizers(report: Report, recipe: Recipe) -> ExampleProcessor | None:
    """The teacher's, or where it has none yet the student's; they must be alike, unless the recipe says so."""
    assert recipe.teacher is not None
    found: dict[str, ExampleProcessor] = {}
    for role, model in (("teacher", recipe.teacher), ("student", recipe.student)):
        if is_made_later(recipe, model.model):
            report.add(role, f"{model.model} is not there yet: it is made when the recipe is first run")
            continue
        report.add(role, model.model)
        require_model(report, model.model, model.revision, weights=role == "teacher")
        with report.collecting():
            processor = describe_tokenizer(report, recipe, model.model, revision=model.revision)
            if processor is not None:
                found[role] = processor
    with report.collecting():
        require_training_recipe(recipe)
    if recipe.student.other_vocabulary:
        return found.get("teacher")
    if len(found) == 2:
        with report.collecting():
            _require_alike(found["teacher"], found["student"])
    return next(iter(found.values()), None)


def _require_alike(teacher: ExampleProcessor, student: ExampleProcessor) -> None:
    problems = []
    for what in ("tokenizer_fingerprint", "template_fingerprint"):
        one, other = getattr(teacher, what), getattr(student, what)
        if one != other:
            problems.append(
                f"{what.removesuffix('_fingerprint')}: the teacher's is {one[:12]}, the student's {other[:12]}; they "
                "must be the same in content. Give the student's folder the teacher's files, or set "
                "student.other_vocabulary: true"
            )
    if problems:
        raise RecipeError("\n".join(problems))


def _describe_cache(report: Report, recipe: Recipe, processor: ExampleProcessor | None) -> None:
    assert recipe.cache is not None
    policy = recipe.cache.policy
    report.add(
        "targets", f"{_policy_text(policy)}; temperatures {', '.join(map(str, recipe.cache.temperatures))}"
    )
    if recipe.cache.visual_gain is not None:
        report.add("second pass", f"of rows with pictures, these {recipe.cache.visual_gain}")
    if "://" not in recipe.cache.location:
        with report.collecting():
            _require_writable_or_whole(report, recipe, Path(recipe.cache.location))
        if not is_local(recipe.cache.location):
            report.add("cache", f"{recipe.cache.location} is not there yet")
            return
    folder = open_folder(recipe.cache.location)
    if folder.size(MANIFEST_NAME) is None:
        report.add("cache", f"{recipe.cache.location} has no manifest yet: its capture has not ended")
        if folder.size(PLAN_NAME) is None:
            require_no_other_files(folder)
        return
    cache = CacheReader(recipe.cache.location)
    describe_caches(report, recipe, cache)
    if processor is not None:
        stored = cache.manifest.identity
        weights = stored.teacher.weights_fingerprint
        asked = identity_of(recipe, processor, CaptureData(()), weights_fingerprint=weights)
        stored.compare_capture(asked).require(
            where=f"cache {cache.location}", remedy="Capture into another folder, or delete this one."
        )


def _require_writable_or_whole(report: Report, recipe: Recipe, path: Path) -> None:
    """Raises   RecipeError  when nothing can be written there, and something is left to capture"""
    try:
        require_writable(path, what="cache.path")
    except RecipeError as error:
        if not ((path / MANIFEST_NAME).exists() and cache_covers(recipe)):
            raise
        report.note(f"{error}; nothing has to be: it holds all of the data")


def _describe_writing(report: Report, recipe: Recipe) -> None:
    config = recipe.write
    if config is None or config.path is None:
        return
    how = (
        "the likeliest" if config.temperature == 0 else f"{config.per_prompt} sampled at {config.temperature}"
    )
    report.add("answers", f"{how} to each prompt of {', '.join(config.splits)}, into {config.path}")
    require_writable(Path(config.path), what="write.path")


def _policy_text(policy: Threshold | TopK | TopP | Random) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in policy.model_dump(exclude={"kind"}).items())
    return f"{policy.kind} ({settings})"


def _describe_teacher(report: Report, recipe: Recipe, *, num_ranks: int) -> PreTrainedModel | None:
    """Parameters and memory, from the shapes alone; None where the teacher is not there yet."""
    assert recipe.teacher is not None
    assert recipe.cache is not None
    teacher = recipe.teacher
    if is_made_later(recipe, teacher.model):
        return None
    if would_be_fetched(teacher.model, teacher.revision):
        report.add("  teacher", f"{teacher.model} is not on this machine: not looked at")
        return None
    dtype = getattr(torch, teacher.dtype)
    config = load_config(teacher.model, teacher.revision)
    in_copies = teacher.ranks_per_copy > 1
    describe_quantization(report, teacher.model, config, dequantize=teacher.shard or in_copies)
    model = empty_vlm(
        config,
        dtype=dtype,
        attn_implementation=teacher.attn_implementation,
    )
    total = sum(p.numel() for p in model.parameters())
    report.add("parameters", f"{total:,} of the teacher, all frozen")
    describe_shape(report, model)
    held = float(total)
    if teacher.shard:
        in_blocks = sum(p.numel() for block in blocks(model) for p in block.parameters())
        held = total - in_blocks + in_blocks / num_ranks
    elif in_copies:
        with report.collecting():
            teacher.require_ranks(num_ranks)
            plan = plan_of(model, tensor=teacher.tensor, expert=teacher.expert, section="teacher")
            num_split = plan.num_split(model)
            held = total - num_split + num_split / teacher.ranks_per_copy
            report.add(
                "copies",
                f"{num_ranks // teacher.ranks_per_copy}, each shared by {teacher.ranks_per_copy} ranks",
            )
    weights = held * dtype.itemsize / GIB
    width = split(model)[1].weight_VD.shape[0]
    chunk = chunk_positions(recipe.cache.chunk_size, width, default_device())
    logits = chunk * width * FP32_BYTES * LOGITS_AT_ONCE / GIB
    hidden = model.config.get_text_config().hidden_size
    activations = recipe.cache.batch_tokens * hidden * dtype.itemsize * TENSORS_PER_LAYER / GIB
    report.add(
        "memory per device",
        f"about {weights + logits + activations:.2f} GiB on {num_ranks} rank(s): weights {weights:.2f}, a chunk's "
        f"logits {logits:.2f}, activations {activations:.2f}",
    )
    return model

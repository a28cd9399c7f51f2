"""What a recipe would do and take, found out without training: ``train-student check RECIPE``.

Everything that is wrong is collected and shown at once.  Configuration, tokenizer and data are opened, no
weights; a data set that is not on this machine is not fetched.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from shared.data.processing import ExampleProcessor
from shared.data.rows import open_split
from shared.errors import CacheMismatchError, RecipeError
from shared.preflight import (
    TOKENS_WITHOUT_DATA,
    Report,
    describe_cache_totals,
    describe_long_example,
    describe_shape,
    describe_split,
    describe_tokenizer,
    is_local,
    is_made_later,
)
from shared.recipes import Recipe, Split
from shared.survey import cache_covers
from stage2_student.estimate import count_parameters, estimate_memory
from stage2_student.train import require_even_ranks, step_shape, total_steps
from stage2_student.training.freezing import find_parts
from stage2_student.training.inputs import open_cache
from stage2_student.training.student import check_vocabulary, choose_trained, meta_model


def check_recipe(recipe: Recipe, *, num_ranks: int) -> Report:
    """Looks at everything that a run of ``num_ranks`` processes would need."""
    report = Report()
    report.add("run", f"{recipe.run.path}" + (" (exists)" if recipe.run.path.exists() else ""))
    model = processor = None
    if is_made_later(recipe, recipe.student.model):
        report.add("student", f"{recipe.student.model} is not there yet: `make train-student` makes it")
    else:
        with report.collecting():
            model = meta_model(recipe.student)
            _describe_model(report, recipe, model)
        with report.collecting():
            processor = describe_tokenizer(
                report, recipe.student.model, recipe.data, revision=recipe.student.revision
            )
    if model is not None and processor is not None:
        with report.collecting():
            check_vocabulary(model, processor.num_token_ids)
    tokens = _describe_data(report, recipe, processor)
    if processor is not None:
        with report.collecting():
            _describe_cache(report, recipe, processor)
    with report.collecting():
        _describe_steps(report, recipe, num_ranks)
    if model is not None:
        memory = estimate_memory(model, recipe, num_ranks=num_ranks, tokens_per_example=tokens)
        parts = ", ".join(f"{name} {value:.2f}" for name, value in vars(memory).items())
        report.add("memory per device", f"about {memory.total:.2f} GiB on {num_ranks} rank(s): {parts}")
    return report


def _describe_model(report: Report, recipe: Recipe, model: PreTrainedModel) -> None:
    report.add("student", f"{recipe.student.model} ({type(model).__name__})")
    choose_trained(model, recipe.student, seed=recipe.run.seed)
    total, trained = count_parameters(model), count_parameters(model, trained_only=True)
    report.add("parameters", f"{total:,}: {trained:,} trained, {total - trained:,} frozen")
    for name, modules in find_parts(model).items():
        if modules:
            parameters = {id(p): p for module in modules for p in module.parameters()}.values()
            total = sum(p.numel() for p in parameters)
            trained = sum(p.numel() for p in parameters if p.requires_grad)
            report.add(f"  {name}", f"{total:,}: {trained:,} trained")
    describe_shape(report, model)


def _describe_data(report: Report, recipe: Recipe, processor: ExampleProcessor | None) -> int:
    """Returns the tokens of a long example, for the estimate."""
    if not is_local(recipe.data.source):
        report.add("data", f"{recipe.data.source} is not on this machine: not looked at")
        return TOKENS_WITHOUT_DATA
    wanted: list[Split] = ["train", "validation"] if recipe.data.splits.validation else ["train"]
    for name in wanted:
        with report.collecting():
            describe_split(report, recipe.data, name, processor)
    with report.collecting():
        return describe_long_example(report, recipe.data, processor)
    return TOKENS_WITHOUT_DATA


def _describe_cache(report: Report, recipe: Recipe, processor: ExampleProcessor) -> None:
    if not recipe.distils:
        report.add("cache", "none needed: kd_ratio is 0")
        return
    assert recipe.cache is not None
    if "://" not in recipe.cache.path and not is_local(recipe.cache.path):
        report.add("cache", f"{recipe.cache.path} is not there yet: teacher-cache makes it")
        return
    cache, notices = open_cache(recipe, processor)
    assert cache is not None
    describe_cache_totals(report, cache)
    if is_local(recipe.data.source) and not cache_covers(recipe):
        raise CacheMismatchError(
            f"cache {recipe.cache.path} lacks examples of {recipe.data.source}. Run teacher-cache again: only what "
            "is missing is captured"
        )
    for notice in notices:
        report.add("  note", notice)


def _describe_steps(report: Report, recipe: Recipe, num_ranks: int) -> None:
    config = recipe.optimization
    rounds = require_even_ranks(recipe, num_ranks)
    report.add(
        "step",
        f"{config.global_batch_size} examples: {rounds} round(s) of {config.microbatch_size} on {num_ranks} rank(s)",
    )
    if num_ranks % recipe.parallel.dp_replicate:
        raise RecipeError(
            f"parallel.dp_replicate {recipe.parallel.dp_replicate} does not divide {num_ranks} ranks"
        )
    if is_local(recipe.data.source):
        shape = step_shape(recipe, len(open_split(recipe.data, "train")))
        report.add("steps", f"{total_steps(recipe, shape):,}, {shape.num_steps_per_epoch:,} an epoch")
    elif config.max_steps is not None:
        report.add("steps", f"{config.max_steps:,}")

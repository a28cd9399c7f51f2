"""What a recipe would do and take, found out without training: ``train-student check RECIPE``.

Everything that is wrong is collected and shown at once.  Configuration, tokenizer and data are opened, no
weights; a data set that is not on this machine is not fetched.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedModel

from shared.cache import open_caches
from shared.completeness import require_in_the_cache
from shared.data.processing import ExampleProcessor
from shared.dealing import Work
from shared.errors import RecipeError
from shared.models.packing import require_packing
from shared.models.plans import Plan
from shared.models.vlm import context_of, load_config
from shared.other_vocabulary import StudentOfAnother
from shared.places import is_there
from shared.preflight import (
    TOKENS_WITHOUT_DATA,
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
    require_writable,
    would_be_fetched,
)
from shared.recipes import Recipe, Split, baseline_of, trainer_of
from shared.same_prompts import open_student_processor_of
from shared.split_check import SplitFound
from stage2_student.estimate import count_parameters, estimate_memory
from stage2_student.training.coverage import look_at_coverage
from stage2_student.training.freezing import parameters_of_parts
from stage2_student.training.inputs import open_cache
from stage2_student.training.lora import beside_adapters
from stage2_student.training.notes import notes_on
from stage2_student.training.order import step_costs, step_shape, total_steps
from stage2_student.training.picture_costs import tokens_per_pixel
from stage2_student.training.student import choose_trained, empty_model, plan_of_student


def check_recipe(recipe: Recipe, *, num_ranks: int) -> Report:
    """Looks at everything that a run of ``num_ranks`` processes would need."""
    report = Report()
    report.add("run", f"{recipe.run.path}" + (" (exists)" if recipe.run.path.exists() else ""))
    with report.collecting():
        require_writable(recipe.run.path, what="run.root")
    _look_at_named_recipes(report, recipe)
    model, processor, plan = _describe_student(report, recipe)
    require_head(report, model, processor, what=f"student {recipe.student.model}")
    wanted: list[Split] = ["train", "validation"] if recipe.data.splits.validation else ["train"]
    looked = describe_data(report, recipe, wanted, processor)
    context = None if model is None else context_of(model.config)
    for found in looked:
        with report.collecting():
            found.require_short(context, model=f"student {recipe.student.model}")
    skipped: dict[str, list[str]] = {}
    if processor is not None:
        with report.collecting():
            skipped = _describe_cache(report, recipe, processor, looked)
    for found in looked:
        name = found.split.name
        what = f"{recipe.data.source}, split {name}"
        describe_unusable(report, [found], recipe.data, what=what, also=skipped.get(name, []))
    with report.collecting():
        _describe_steps(report, recipe, model, num_ranks, looked, skipped)
    if model is not None:
        tokens = max((found.longest for found in looked), default=0) or TOKENS_WITHOUT_DATA
        memory = estimate_memory(model, recipe, num_ranks=num_ranks, tokens_per_example=tokens, plan=plan)
        parts = ", ".join(f"{name} {value:.2f}" for name, value in vars(memory).items())
        report.add("memory per device", f"about {memory.total:.2f} GiB on {num_ranks} rank(s): {parts}")
    return report


def _look_at_named_recipes(report: Report, recipe: Recipe) -> None:
    """`make train-student` needs the baseline's; the teacher's it needs only where there is no teacher yet."""
    with report.collecting():
        baseline_of(recipe)
    try:
        trainer_of(recipe)
    except RecipeError as error:
        report.note(str(error))


def _describe_student(
    report: Report, recipe: Recipe
) -> tuple[PreTrainedModel | None, ExampleProcessor | None, Plan]:
    """The student's shape, its processor, where they are on this machine, and how its layers are split."""
    student = recipe.student
    if is_made_later(recipe, student.model):
        report.add("student", f"{student.model} is not there yet: `make train-student` makes it")
        return None, None, Plan()
    require_model(report, student.model, student.revision, weights=student.init == "pretrained")
    model = processor = None
    plan = Plan()
    if would_be_fetched(student.model, student.revision):
        report.add("student", f"{student.model} is not on this machine: not looked at")
    else:
        with report.collecting():
            config = load_config(student.model, student.revision)
            model = empty_model(config, student)
            with report.collecting():
                plan = plan_of_student(model, recipe.parallel)
            _describe_model(report, recipe, model)
            plan = beside_adapters(plan, model)
            describe_quantization(report, student.model, config, dequantize=True)
    with report.collecting():
        processor = describe_tokenizer(report, recipe, student.model, revision=student.revision)
    if processor is not None and student.other_vocabulary and recipe.cache is not None:
        processor = None
        with report.collecting():
            processor = _beside_the_teacher(report, recipe)
    return model, processor, plan


def _beside_the_teacher(report: Report, recipe: Recipe) -> ExampleProcessor | None:
    """The student's processor, which knows the teacher's tokenizer; None where that is not on this machine."""
    assert recipe.teacher is not None
    teacher = recipe.teacher
    is_later = is_made_later(recipe, teacher.model)
    if is_later or would_be_fetched(teacher.model, teacher.revision):
        lacking = "there yet" if is_later else "on this machine"
        report.add("  teacher's", f"{teacher.model} is not {lacking}: its tokenizer is not looked at")
        return None
    return open_student_processor_of(recipe, recipe.student.model, revision=recipe.student.revision)


def _describe_model(report: Report, recipe: Recipe, model: PreTrainedModel) -> None:
    report.add("student", f"{recipe.student.model} ({type(model).__name__})")
    with report.collecting():
        if recipe.optimization.packing:
            require_packing(model)
    choose_trained(model, recipe.student, seed=recipe.run.seed)
    total, trained = count_parameters(model), count_parameters(model, trained_only=True)
    report.add("parameters", f"{total:,}: {trained:,} trained, {total - trained:,} frozen")
    for name, parameters in parameters_of_parts(model).items():
        if parameters:
            total = sum(p.numel() for p in parameters)
            trained = sum(p.numel() for p in parameters if p.requires_grad)
            report.add(f"  {name}", f"{total:,}: {trained:,} trained")
    describe_shape(report, model)
    for note in notes_on(model, recipe):
        report.note(note)


def _describe_cache(
    report: Report, recipe: Recipe, processor: ExampleProcessor, looked: list[SplitFound]
) -> dict[str, list[str]]:
    """Returns, by split, why rows are not in the cache that a capture has left out."""
    if not recipe.distils:
        report.add("cache", "none needed: kd_ratio is 0")
        return {}
    assert recipe.cache is not None
    absent = [location for location in recipe.cache.locations if not is_there(location)]
    if absent and recipe.cache.is_one:
        report.add("cache", f"{absent[0]} is not there yet: teacher-cache makes it")
        return {}
    cache = open_caches(recipe.cache)
    describe_caches(report, recipe, cache)
    with report.collecting():
        _, notices = open_cache(recipe, processor)
        for notice in notices:
            report.note(notice)
        if isinstance(processor, StudentOfAnother):
            for found in looked:
                covered = look_at_coverage(found.split, found.rows, processor, cache)
                report.add("  of " + found.split.name, covered.text())
    skipped, left_out = cache.skipped, dict[str, list[str]]()
    missing: list[tuple[bytes, str]] = []
    for found in looked:
        for place in np.flatnonzero(~cache.contains(found.keys)).tolist():
            where, key = found.split.where(found.rows[place]), found.keys[place].tobytes()
            if (reason := skipped.get(key.hex())) is not None:
                left_out.setdefault(found.split.name, []).append(f"{where}: not in the cache: {reason}")
            else:
                missing.append((key, where))
    if missing:
        with report.collecting():
            require_in_the_cache(
                cache,
                [key for key, _ in missing],
                processor,
                recipe.data,
                name_of=lambda place: missing[place][1],
                num_all=sum(len(found.keys) for found in looked),
            )
    return left_out


def _describe_steps(
    report: Report,
    recipe: Recipe,
    model: PreTrainedModel | None,
    num_ranks: int,
    looked: list[SplitFound],
    skipped: dict[str, list[str]],
) -> None:
    config = recipe.optimization
    recipe.parallel.require_ranks(num_ranks)
    train = [found for found in looked if found.split.name == recipe.data.splits.train]
    num_examples = sum(found.num_usable - len(skipped.get(found.split.name, [])) for found in train)
    if num_examples:
        shape = step_shape(recipe, num_examples)
        lengths, pixels = (
            np.concatenate([getattr(found, name) for found in train])[:num_examples]
            for name in ("lengths", "pixels")
        )
        if len(lengths) == num_examples:
            pictures = np.rint(pixels * (0.0 if model is None else tokens_per_pixel(model)))
            work = Work.of(lengths, pictures, packed=config.packing)
            costs = step_costs(shape, work, num_ranks // recipe.parallel.tensor)
            report.add("step", f"{config.global_batch_size} examples: {costs}")
        report.add("steps", f"{total_steps(recipe, shape):,}, {shape.num_steps_per_epoch:,} an epoch")
    elif config.max_steps is not None:
        report.add("steps", f"{config.max_steps:,}")

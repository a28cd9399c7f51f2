"""CE and KL of any model, as validation computes them for the student in training.

found = losses_of(recipe, source, world, split="validation")
found.ce, found.kl        # nats a position
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import click

from shared.errors import CacheFormatError, CacheMismatchError
from shared.recipes import FreezeConfig, ParallelConfig, Recipe, Split
from shared.runtime import World
from shared.same_prompts import open_student_processor_of
from shared.same_teacher import require_teacher
from stage2_student.evaluation.answers import ModelSource
from stage2_student.evaluation.shuffled import with_other_pictures
from stage2_student.training.inputs import no_kl, open_targets
from stage2_student.training.order import limits_of, pass_slots
from stage2_student.training.student import KL_TEMPERATURE, build_student
from stage2_student.training.survey import Survey, survey_once
from stage2_student.training.validate import Validation, validate


@dataclass(frozen=True)
class ModelLosses:
    """Nats a position.

    kl          to the teacher at temperature 1; None where it was not measured
    soft_ce     with a teacher of another tokenizer, in the place of KL; None where there is no such teacher
    by_row      number of rows, and means over rows of their means over positions: rows, ce, kl; else empty
    by_teacher  of the targets, where the caches are of several: names, positions, ce, kl, teacher_ce; else empty
    """

    ce: float
    kl: float | None = None
    by_teacher: dict[str, list[Any]] = field(default_factory=dict)
    soft_ce: float | None = None
    by_row: dict[str, Any] = field(default_factory=dict)


def losses_of(
    recipe: Recipe,
    source: ModelSource,
    world: World,
    *,
    split: Split,
    num_examples: int | None = None,
    found: Survey | None = None,
    shuffle_pictures: bool = False,
) -> ModelLosses:
    """CE, and KL to the teacher at temperature 1 from the cache; called by all ranks.

    KL is None where there is no cache of this data, and what keeps the model from it is said; with shuffled
    pictures there is none, as no teacher was asked.
    """
    validated = partial(
        _validated,
        recipe,
        source,
        world,
        split=split,
        num_examples=num_examples,
        survey=found,
        shuffle_pictures=shuffle_pictures,
    )
    if recipe.cache is not None and not shuffle_pictures:
        try:
            measured = validated(with_kl=True)
        except (CacheFormatError, CacheMismatchError, FileNotFoundError) as error:
            if world.is_main:
                click.echo(f"note: {no_kl(error)}", err=True)
        else:
            by_teacher = measured.groups.to_json().get("by_teacher", {})
            losses = measured.losses
            return ModelLosses(losses.ce, losses.kl, by_teacher, losses.soft_ce, measured.groups.of_rows())
    measured = validated(with_kl=False)
    return ModelLosses(measured.losses.ce, by_row=measured.groups.of_rows())


def _validated(
    recipe: Recipe,
    source: ModelSource,
    world: World,
    *,
    split: Split,
    num_examples: int | None,
    survey: Survey | None,
    shuffle_pictures: bool,
    with_kl: bool,
) -> Validation:
    processor = open_student_processor_of(recipe, source.model, revision=source.revision)
    cache = None
    if with_kl:
        cache, _ = open_targets(recipe, processor, temperature=KL_TEMPERATURE)
        distilled = cache
        world.by_main(lambda: require_teacher(distilled, recipe.teacher))
    found = (survey or survey_once(recipe, split, processor, cache, world)).spread(num_examples)
    if shuffle_pictures:
        found = with_other_pictures(found)
    microbatches = found.microbatches(processor, cache, num_ranks=world.size)
    student = build_student(_plain(recipe, source), world, num_token_ids=processor.num_token_ids)
    slots = pass_slots(
        found.work(student.tokens_per_pixel, packed=False),
        limits=limits_of(recipe.optimization),
        rank=world.rank,
        num_ranks=world.size,
    )
    validation = validate(student, microbatches, slots, world, num_workers=recipe.run.num_workers)
    del student
    world.release_memory()
    return validation


def _plain(recipe: Recipe, source: ModelSource) -> Recipe:
    """The recipe with that model in the student's place, and nothing that only training needs."""
    student = recipe.student.model_copy(
        update={
            "model": source.model,
            "revision": source.revision,
            "param_dtype": source.param_dtype,
            "compute_dtype": source.compute_dtype,
            "attn_implementation": source.attn_implementation,
            "init": "pretrained",
            "lora": None,
            "freeze": FreezeConfig(),
            "compile": False,
        }
    )
    loss = recipe.loss.model_copy(
        update={"kd_ratio": 0.0}
    )  # neither CE nor KL at temperature 1 depends on it
    padded = recipe.optimization.model_copy(update={"packing": False})  # not every model can do without
    parts = {"student": student, "loss": loss, "optimization": padded, "parallel": ParallelConfig()}
    return recipe.model_copy(update=parts)

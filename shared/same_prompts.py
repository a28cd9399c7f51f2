"""Processors that ask as a cache's capture has asked, and what decides the prompts, to compare the two."""

from __future__ import annotations

from shared.cache import Cache, InputsIdentity, Plan, PromptIdentity
from shared.cache.layout import PLAN_NAME
from shared.cache.manifest import load_manifest
from shared.cache.storage import open_folder
from shared.data.processing import ExampleProcessor, open_processor
from shared.errors import CacheMismatchError, RecipeError, TeachonceError, listed
from shared.other_vocabulary import student_of_another
from shared.places import is_there
from shared.recipes import DataConfig, Recipe


def inputs_identity(processor: ExampleProcessor, data: DataConfig) -> InputsIdentity:
    """How examples become tokens and pictures, for the manifest and for the student's comparison with it."""
    return InputsIdentity(
        tokenizer_fingerprint=processor.tokenizer_fingerprint,
        template_fingerprint=processor.template_fingerprint,
        image_processor_fingerprint=processor.image_processor_fingerprint,
        vocab_size=processor.num_token_ids,
        max_answer_tokens=data.max_answer_tokens,
    )


def prompt_identity(processor: ExampleProcessor, data: DataConfig) -> PromptIdentity:
    """What else decides the prompts, for the manifest and for what a student is told."""
    return PromptIdentity(
        system_prompt=data.system_prompt,
        date=processor.date,
        thinking=processor.thinking,
        train_on=data.train_on,
        rendered=processor.rendered,
    )


def open_processor_of(recipe: Recipe, model: str, *, revision: str | None) -> ExampleProcessor:
    """As ``open_processor``, for prompts of the day that the recipe names, or else of its cache's.

    An interrupted capture goes on with the day on which it began.
    """
    return open_processor(model, _of_its_day(recipe).data, revision=revision)


def open_student_processor_of(recipe: Recipe, model: str, *, revision: str | None) -> ExampleProcessor:
    """As ``open_processor_of``; where the recipe says so, the tokenizer may be another one than the teacher's.

    Raises   RecipeError  when one of the two cannot be opened, or their tokens cannot be compared
    """
    if recipe.cache is None or not recipe.student.other_vocabulary:
        return open_processor_of(recipe, model, revision=revision)
    recipe = _of_its_day(recipe)
    return student_of_another(model, recipe.data, _open_teacher_processor(recipe), revision=revision)


def open_processor_of_keys(recipe: Recipe) -> ExampleProcessor | None:
    """The student's, whose keys are its teacher's; of another tokenizer the teacher's, None where it is missing."""
    if not recipe.student.other_vocabulary:
        return open_processor_of(recipe, recipe.student.model, revision=recipe.student.revision)
    assert recipe.teacher is not None
    if recipe.teacher.trained_by is not None and not is_there(recipe.teacher.model):
        return None
    return _open_teacher_processor(_of_its_day(recipe))


def _open_teacher_processor(recipe: Recipe) -> ExampleProcessor:
    assert recipe.teacher is not None  # a recipe with a cache and another tokenizer has one
    try:
        return open_processor(recipe.teacher.model, recipe.data, revision=recipe.teacher.revision)
    except RecipeError as error:
        raise RecipeError(
            f"student.other_vocabulary: the teacher's tokenizer and chat template make the keys of the cache. {error}"
            ". Put its tokenizer and processor files there; its weights are not needed"
        ) from error


def _of_its_day(recipe: Recipe) -> Recipe:
    """Its prompts are written for the day that it names, or else its cache's."""
    if recipe.data.date is not None or recipe.cache is None:
        return recipe
    days = (prompt_date_of(location) for location in recipe.cache.locations)
    return recipe.of_day(next((day for day in days if day is not None), None))


def prompt_date_of(location: str) -> str | None:
    """The day that a cache's prompts tell; None where there is no cache, or one whose prompts have no date."""
    try:
        folder = open_folder(location)
        manifest = load_manifest(folder)
        identity = (
            manifest.identity if manifest else Plan.decode(folder.read(PLAN_NAME), where=location).identity
        )
    except (TeachonceError, OSError):  # whoever opens the cache says what is wrong with it
        return None
    return None if identity.prompt is None else identity.prompt.date


def require_same_rendering(cache: Cache, processor: ExampleProcessor, data: DataConfig) -> None:
    """Raises   CacheMismatchError  when the same settings give another prompt than a cache's; keys do not tell"""
    own = prompt_identity(processor.of_keys, data)
    for part in cache.parts:
        stored = part.manifest.identity.prompt
        if stored is not None and stored.contradicts(own):
            raise CacheMismatchError(
                f"cache {part.location}: the same template writes another text around question and answer:\n"
                f"{listed(stored.differences(own))}\nCompare the special tokens of both tokenizers (bos_token and "
                "others)"
            )

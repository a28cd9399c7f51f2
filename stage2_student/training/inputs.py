"""What a run reads: processor, surveyed splits, and the cache, each checked against the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from shared.cache import CacheReader
from shared.data.processing import ExampleProcessor, open_processor
from shared.recipes import Recipe
from shared.runtime import World
from shared.survey import inputs_identity
from stage2_student.runs.identity import run_identity
from stage2_student.training.feed import MicrobatchSource
from stage2_student.training.survey import Survey, survey_once


@dataclass(frozen=True)
class Inputs:
    """Opened and found to fit together.  ``validation`` is None where the data have no such split."""

    processor: ExampleProcessor
    train: Survey
    validation: Survey | None
    cache: CacheReader | None

    def training_source(self) -> MicrobatchSource:
        return MicrobatchSource(self.train.split, self.train.rows, self.processor, self.cache)

    def validation_source(self) -> MicrobatchSource:
        assert self.validation is not None
        return MicrobatchSource(self.validation.split, self.validation.rows, self.processor, self.cache)

    def identity(self, recipe: Recipe) -> dict[str, Any]:
        """What a checkpoint says it was trained on: by content, so that folders may move."""
        contents = {
            "data.train": self.train.fingerprint,
            "data.validation": None if self.validation is None else self.validation.fingerprint,
            "tokenizer": self.processor.tokenizer_fingerprint,
            "template": self.processor.template_fingerprint,
            "image_processor": self.processor.image_processor_fingerprint,
            "cache.manifest": None if self.cache is None else self.cache.manifest.sha256,
        }
        return run_identity(recipe, contents=contents)


def open_inputs(recipe: Recipe, world: World) -> Inputs:
    """Raises   TeachonceError  of the kind that fits, when something is missing or does not fit"""
    processor = open_processor(recipe.student.model, recipe.data, revision=recipe.student.revision)
    cache, notices = open_cache(recipe, processor)
    if world.is_main:
        for notice in notices:
            tqdm.write(f"note: {notice}")
    train = survey_once(recipe.data, "train", processor, cache, world)
    validation = None
    if recipe.data.splits.validation is not None:
        validation = survey_once(recipe.data, "validation", processor, cache, world)
    return Inputs(processor, train, validation, cache)


def open_cache(recipe: Recipe, processor: ExampleProcessor) -> tuple[CacheReader | None, tuple[str, ...]]:
    """The cache, where the recipe distils, and what is worth saying about it.

    Raises   CacheMismatchError  with all that keeps this student from it
    """
    if not recipe.distils:
        return None, ()
    assert recipe.cache is not None  # the recipe was validated
    reader = CacheReader(recipe.cache.path)
    own = inputs_identity(processor, recipe.data)
    notices = reader.require_student(
        own,
        temperature=recipe.loss.temperature,
        policy=recipe.cache.policy,
        seed=recipe.cache.seed,
        temperatures=recipe.cache.temperatures,
    )
    return reader, notices

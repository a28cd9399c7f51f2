"""What there is to capture: the rows of all splits under one numbering, and the cache's identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shared.cache import CacheReader, DataSource, Identity, SkippedRow, TargetsIdentity, TeacherIdentity
from shared.completeness import captured_splits
from shared.data.processing import ExampleProcessor
from shared.data.rows import VqaSplit, open_split
from shared.errors import DataError, RecipeError, listed
from shared.recipes import Recipe, Split
from shared.runtime import World
from shared.same_prompts import inputs_identity, prompt_identity
from shared.same_teacher import compare_teacher
from shared.surveying import Keyed, Surveyors, survey_keys


@dataclass(frozen=True)
class NumberedRows:
    """The rows of several splits, numbered one after the other; cheap to send to other processes."""

    splits: tuple[VqaSplit, ...]

    def find(self, number: int) -> tuple[VqaSplit, int]:
        """The split and the row in it of a number."""
        for split in self.splits:
            if number < len(split):
                return split, number
            number -= len(split)
        raise IndexError(number)

    def first_number(self, index: int) -> int:
        return sum(len(split) for split in self.splits[:index])

    def name(self, number: int) -> str:
        """How the manifest names a row, like ``train[17]``."""
        split, row = self.find(number)
        return f"{split.name}[{row}]"


@dataclass(frozen=True, eq=False)
class CaptureData:
    """Every row that the recipe wants in its cache."""

    keyed: tuple[Keyed, ...]

    @cached_property
    def keys(self) -> np.ndarray:
        """(n, 16) uint8, in order."""
        return np.concatenate([part.keys for part in self.keyed])

    @cached_property
    def numbers(self) -> np.ndarray:
        """(n,) int64, the number of each key's row, as ``NumberedRows`` counts."""
        rows = NumberedRows(tuple(part.split for part in self.keyed))
        return np.concatenate([rows.first_number(index) + part.rows for index, part in enumerate(self.keyed)])

    def unreadable(self) -> list[SkippedRow]:
        return [
            SkippedRow(row=f"{part.split.name}[{row}]", reason=reason)
            for part in self.keyed
            for row, reason in part.unreadable
        ]

    def sources(self) -> tuple[DataSource, ...]:
        return tuple(
            DataSource(
                name=part.split.source,
                split=part.split.name,
                fingerprint=part.fingerprint,
                rows=len(part.split),
                written_by=part.written_by,
            )
            for part in self.keyed
        )


def open_rows(recipe: Recipe) -> NumberedRows:
    """The splits the cache is to hold, opened but not read."""
    return NumberedRows(tuple(open_split(recipe.data, name) for name in captured_splits(recipe)))


def survey(
    recipe: Recipe,
    processor: ExampleProcessor,
    world: World | None = None,
    *,
    splits: Sequence[Split] | None = None,
) -> CaptureData:
    """What every row is; called by all ranks, which share the reading, or by a process without peers.

    splits   by default those that the cache is to hold
    Raises   DataError  when more rows are unreadable than ``data.max_dropped`` allows
    """
    surveyors = Surveyors.of_capture(recipe, world)
    splits = captured_splits(recipe) if splits is None else splits
    data = CaptureData(
        tuple(survey_keys(recipe.data, name, processor, surveyors, show=True) for name in splits)
    )
    unreadable = data.unreadable()
    if len(unreadable) > recipe.data.max_dropped:
        raise DataError(
            f"{recipe.data.source}: {len(unreadable)} row(s) cannot be used, data.max_dropped allows "
            f"{recipe.data.max_dropped}:\n{listed([row.reason for row in unreadable])}"
        )
    if not len(data.keys):
        reasons = [f"the first: {row.reason}" for row in unreadable[:1]]
        raise DataError("; ".join([f"{recipe.data.source}: no row can be used", *reasons]))
    return data


def identity_of(
    recipe: Recipe, processor: ExampleProcessor, data: CaptureData, *, weights_fingerprint: str
) -> Identity:
    """Whose targets the cache holds, of what, kept how."""
    teacher, cache = recipe.teacher, recipe.cache
    if teacher is None or cache is None:
        raise RecipeError(f"recipe of run {recipe.run.name}: a capture needs a teacher and a cache section")
    return Identity(
        teacher=TeacherIdentity(
            name=teacher.model,
            revision=teacher.revision,
            weights_fingerprint=weights_fingerprint,
            dtype=teacher.dtype,
        ),
        inputs=inputs_identity(processor, recipe.data),
        targets=TargetsIdentity.of_capture(
            cache.policy,
            temperatures=cache.temperatures,
            seed=cache.seed,
            label_log_prob=cache.label_log_prob,
            visual_gain=cache.visual_gain,
        ),
        data=data.sources(),
        prompt=prompt_identity(processor, recipe.data),
    )


def is_same_capture(
    stored: CacheReader, recipe: Recipe, processor: ExampleProcessor, data: CaptureData
) -> bool:
    """Whether a committed cache is what this recipe asks for, as far as can be said without loading weights."""
    assert recipe.teacher is not None
    identity = stored.manifest.identity
    ours = identity_of(recipe, processor, data, weights_fingerprint=identity.teacher.weights_fingerprint)
    differences = identity.compare_capture(ours).refusals + compare_teacher(stored, recipe.teacher).refusals
    return not differences

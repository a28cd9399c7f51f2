"""Rows that differ from those a run began with: told one by one, and accepted where no finished step used them last.

A run keeps the key of each of its rows, in a file named by their fingerprint, which the checkpoints know.  So a row
that was mended, left out or added is found by its number when the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.cache import Cache
from shared.data.processing import KEY_BYTES
from shared.errors import CheckpointError, NotAFileError, listed
from shared.recipes import Recipe
from shared.regular_files import read_regular
from shared.shard_order import ShardLayout
from shared.surveying import keys_fingerprint
from stage2_student.publishing.card import ROW_TEACHERS, caches_in, facts_of_caches, read_sources
from stage2_student.runs.checkpoint import Checkpoint
from stage2_student.runs.files import write_bytes
from stage2_student.runs.identity import CACHE
from stage2_student.runs.run_folder import RunFolder
from stage2_student.training.cache_change import cache_changes, require_same_teachers
from stage2_student.training.order import StepShape, step_examples, step_shape, total_steps
from stage2_student.training.survey import Survey

NUMBER_BYTES = 8


@dataclass(frozen=True)
class RowKeys:
    """Rows of a split, in order, and the key of each.

    Shapes   rows (n,) int64; keys (n, 16) uint8
    """

    rows: np.ndarray
    keys: np.ndarray

    @classmethod
    def of(cls, survey: Survey) -> RowKeys:
        return cls(survey.rows, survey.keys)

    @property
    def fingerprint(self) -> str:
        return keys_fingerprint(self.keys)


def keep_rows(folder: RunFolder, survey: Survey) -> None:
    """Writes the keys beside the run's log."""
    numbers = survey.rows.astype("<i8").view(np.uint8).reshape(-1, NUMBER_BYTES)
    write_bytes(_path(folder, survey.fingerprint), np.concatenate([numbers, survey.keys], axis=1).tobytes())


def kept_rows(folder: RunFolder, fingerprint: str) -> RowKeys | None:
    """None where they are not there, or are not those of that fingerprint."""
    try:
        read = np.frombuffer(read_regular(_path(folder, fingerprint)), np.uint8)
    except (OSError, NotAFileError):
        return None
    if len(read) % (NUMBER_BYTES + KEY_BYTES):
        return None
    table = read.reshape(-1, NUMBER_BYTES + KEY_BYTES)
    numbers = np.ascontiguousarray(table[:, :NUMBER_BYTES]).view("<i8")[:, 0]
    found = RowKeys(numbers, np.ascontiguousarray(table[:, NUMBER_BYTES:]))
    return found if found.fingerprint == fingerprint else None


def accept_data_change(
    recipe: Recipe,
    folder: RunFolder,
    checkpoint: Checkpoint,
    surveys: dict[str, Survey],
    cache: Cache | None,
    layout: ShardLayout | None,
) -> list[str]:
    """What has changed since the checkpoint, for people; empty when nothing has.

    surveys  of the splits, by the name they have in the identity (``data.train``)
    layout   where the examples lie, if their order follows the cache's shards: the checkpoint's, as another one is
             another order

    Raises   CheckpointError  when a row of finished steps alone has changed, when the run has not kept its rows,
                              when a cache is of another teacher or has other targets, or when a row would change
                              its teacher
    """
    told: list[str] = []
    train = surveys["data.train"]
    known = [train.keys]  # rows whose teachers the run has noted: as they are now, or as they were
    for name, survey in surveys.items():
        before = checkpoint.facts.identity.get(name)
        if before == survey.fingerprint:
            continue
        kept = kept_rows(folder, str(before))
        if kept is None:
            raise CheckpointError(
                f"run {folder.path}: its rows of {name} were not kept, so what has changed cannot be told. Give them "
                "back, or another run.name"
            )
        change = Change.between(kept, RowKeys.of(survey))
        told += change.lines(name, survey)
        if name == "data.train":
            shape = step_shape(recipe, len(kept.rows), layout)
            _require_unused(recipe, shape, folder, checkpoint, kept, change, survey)
            known.append(kept.keys)
    if cache is not None and checkpoint.facts.identity.get(CACHE) != cache.fingerprint:
        sources = read_sources(folder)
        told += cache_changes(folder, caches_in(sources), facts_of_caches(cache))
        taught = [cache.teachers_digest(keys) for keys in known if cache.contains(keys).all()]
        require_same_teachers(folder, sources.get(ROW_TEACHERS), taught)
    return told


@dataclass(frozen=True)
class Change:
    """Rows that were mended, left out or added."""

    num_before: int
    num_now: int
    mended: tuple[int, ...]
    left_out: tuple[int, ...]
    added: tuple[int, ...]

    @classmethod
    def between(cls, before: RowKeys, now: RowKeys) -> Change:
        both, old, new = np.intersect1d(before.rows, now.rows, assume_unique=True, return_indices=True)
        is_mended = (before.keys[old] != now.keys[new]).any(axis=1)
        left_out = np.setdiff1d(before.rows, now.rows, assume_unique=True)
        added = np.setdiff1d(now.rows, before.rows, assume_unique=True)
        mended, gone, come = (tuple(rows.tolist()) for rows in (both[is_mended], left_out, added))
        return cls(len(before.rows), len(now.rows), mended, gone, come)

    def lines(self, name: str, survey: Survey) -> Iterator[str]:
        yield f"{name}: {self.num_before} rows before, {self.num_now} now"
        kinds = {"other content": self.mended, "left out": self.left_out, "new": self.added}
        for what, rows in kinds.items():
            if rows:
                yield f"{what}, {len(rows)} row(s):\n{listed([survey.split.where(row) for row in rows])}"
        if name == "data.train" and (self.left_out or self.added):
            yield (
                "the order of what is left is drawn anew over these rows: in this epoch some are seen twice, or not "
                "at all"
            )


def _require_unused(
    recipe: Recipe,
    shape: StepShape,
    folder: RunFolder,
    checkpoint: Checkpoint,
    kept: RowKeys,
    change: Change,
    survey: Survey,
) -> None:
    begin, end = checkpoint.facts.step, total_steps(recipe, shape)
    coming: set[int] = set()
    for step in range(
        begin, min(end, begin + 2 * shape.num_steps_per_epoch)
    ):  # the rest of an epoch, and a whole one
        coming |= {int(kept.rows[example]) for example in step_examples(step, shape)}
    if over := [row for row in (*change.mended, *change.left_out) if row not in coming]:
        raise CheckpointError(
            f"run {folder.path}: {len(over)} row(s) have changed that the {begin} finished steps were trained on, "
            f"and no later step uses:\n{listed([survey.split.where(row) for row in over])}\nGive them back as they "
            "were, or another run.name"
        )


def _path(folder: RunFolder, fingerprint: str) -> Path:
    return folder.path / f"rows-{fingerprint}.bin"

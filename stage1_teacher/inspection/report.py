"""A cache as one HTML page: what it holds, how sure its teacher is, what that costs, and examples to look at.

    write_cache_report(CacheReader("work/caches/phantom"), recipe, Path("report.html"))

Figures are of a sample of the cache's rows; pictures need the data set that the cache was captured from.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shared.cache import CacheReader, Row
from shared.cache.inspect import Sample, inspect, sample_rows
from shared.capture.planning import open_rows
from shared.data.images import Background
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.rows import Example
from shared.errors import CacheFormatError, DataError, RecipeError, TeachonceError
from shared.progress import progress
from shared.recipes import Recipe
from shared.reports.page import (
    Page,
    Section,
    card,
    cards,
    facts,
    figure,
    figures,
    grid,
    paragraph,
    table,
    write_page,
)
from stage1_teacher.inspection.plots import DRAWINGS, draw_kept_mass

NUM_LOOKED_AT = 512
NUM_SHOWN = 6  # at each end


@dataclass(frozen=True)
class Shown:
    """A row of the data set beside what the cache holds of it."""

    example: Example
    row: Row

    @property
    def entropy(self) -> float:
        return float(self.row.entropy_sums[0]) / self.row.num_positions

    @property
    def cross_entropy(self) -> float:
        return self.row.ce_sum / self.row.num_positions


def write_cache_report(reader: CacheReader, recipe: Recipe | None, path: Path, *, seed: int = 0) -> None:
    """recipe  of the capture, whose data are shown; without one there are no examples

    Raises   CacheFormatError  when the cache is empty
             RecipeError       when matplotlib is not installed, or the recipe is not one of a capture
    """
    if not len(reader):
        raise CacheFormatError(f"cache {reader.location}: it is empty, there is nothing to report")
    if recipe is not None and (recipe.teacher is None or recipe.cache is None):
        raise RecipeError(
            f"recipe of run {recipe.run.name}: a report with examples needs a teacher and a cache section. Give the "
            "recipe of the capture (--recipe), or none"
        )
    summary, sample = inspect(reader), sample_rows(reader)
    sections = [
        Section("What it is", [facts(_identity(summary))]),
        Section("What it holds", [grid([facts(_contents(summary)), facts(_quality(summary))])]),
        Section("How sure the teacher is, and what that costs", [figures(_figures(sample))]),
    ]
    sections += _shown_examples(reader, recipe, seed=seed)
    write_page(
        Page(f"Cache {reader.location}", sections, lead="Targets of a frozen teacher, by teachonce."), path
    )


def _shown_examples(reader: CacheReader, recipe: Recipe | None, *, seed: int) -> list[Section]:
    """Examples, or the reason why there are none."""
    if recipe is None:
        why = "No recipe was given."
    else:
        try:
            if found := look_at(reader, recipe, seed=seed):
                return _examples(found, recipe.data.background)
            why = "None of the rows that were looked at is in the cache."
        except TeachonceError as error:
            why = str(error)
    return [Section("Examples", [paragraph(why)])]


def look_at(reader: CacheReader, recipe: Recipe, *, seed: int) -> list[Shown]:
    """Random rows of the data that the cache holds and whose pictures can be shown, surest first."""
    processor = _processor(recipe)
    rows = open_rows(recipe)
    total = sum(len(split) for split in rows.splits)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:NUM_LOOKED_AT].tolist()
    found: dict[bytes, Example] = {}
    for number in progress(order, desc="reading examples", unit="ex", leave=False):
        split, row = rows.find(number)
        try:
            example = split[row]
        except DataError:
            continue
        key = processor.key(example)
        if key in reader:
            found.setdefault(key, example)
    held = reader.rows(list(found))
    shown = [Shown(example, row) for example, row in zip(found.values(), held, strict=True)]
    return sorted(shown, key=lambda one: one.entropy)


def _processor(recipe: Recipe) -> ExampleProcessor:
    """The teacher's, or the student's where the teacher is gone: keys are the same."""
    assert recipe.teacher is not None
    try:
        return open_processor(recipe.teacher.model, recipe.data, revision=recipe.teacher.revision)
    except TeachonceError:
        return open_processor(recipe.student.model, recipe.data, revision=recipe.student.revision)


def _identity(summary: dict[str, Any]) -> dict[str, Any]:
    identity = summary["identity"]
    teacher, targets = identity["teacher"], identity["targets"]
    policy = ", ".join(f"{name} {value}" for name, value in targets["policy"].items())
    return {
        "cache": f"{summary['location']}, {summary['sha256'][:16]}",
        "teacher": f"{teacher['name']}, {teacher['dtype']}",
        "weights": teacher["weights_fingerprint"][:16],
        "targets": policy,
        "temperatures": ", ".join(map(str, targets["temperatures"])),
        "seed": targets["seed"],
        "vocabulary": f"{identity['inputs']['vocab_size']:,} ids",
        **_sources(identity["data"]),
    }


def _sources(data: list[dict[str, Any]]) -> dict[str, str]:
    """The data sets of each split: a merged cache has several."""
    found: dict[str, list[str]] = {}
    for part in data:
        found.setdefault(f"data, {part['split']}", []).append(f"{part['name']}: {part['rows']:,} rows")
    return {split: "; ".join(parts) for split, parts in found.items()}


def _contents(summary: dict[str, Any]) -> dict[str, str]:
    totals = summary["totals"]
    return {
        "examples": f"{totals['examples']:,}",
        "positions": f"{totals['positions']:,}",
        "entries": f"{totals['entries']:,}",
        "size": f"{totals['bytes'] / 2**20:.2f} MiB in {summary['shards']} shard(s)",
        "bytes a position": f"{summary['bytes_per_position']:.1f}",
        "entries a position": f"{summary['entries_per_position']:.1f}",
        "answers cut": f"{totals['truncated']:,}",
        "rows left out": f"{totals['skipped']:,}",
        "rows equal to an earlier one": f"{totals['duplicates']:,}",
    }


def _quality(summary: dict[str, Any]) -> dict[str, str]:
    sample = summary["sample"]
    mass = {
        f"kept mass, T = {t}": f"{values['mean']:.5f} in the mean"
        for t, values in sample["kept_mass"].items()
    }
    return {
        "sampled": f"{sample['rows']:,} rows, {sample['positions']:,} positions",
        **mass,
        **{f"teacher's entropy, T = {t}": f"{value:.3f} nats" for t, value in sample["entropy"].items()},
        "teacher's cross-entropy": f"{sample['cross_entropy']:.3f} nats",
    }


def _figures(sample: Sample) -> list[str]:
    captions = {
        "entries": "Uncertain positions keep more entries, by themselves.",
        "certainty": "Means over an example's positions.",
        "bytes": "What an example costs follows from how sure the teacher is.",
    }
    drawings = [(draw, captions[name]) for name, draw in DRAWINGS.items()]
    kept = "Sums of a position's weights; of a draw one in expectation, of a cut what was kept."
    return [
        figure(partial(draw, sample=sample), caption) for draw, caption in [*drawings, (draw_kept_mass, kept)]
    ]


def _examples(found: list[Shown], background: Background) -> list[Section]:
    kinds = Counter(one.example.kind or "(none)" for one in found)
    rows = []
    for kind, number in kinds.most_common():
        of_kind = [one for one in found if (one.example.kind or "(none)") == kind]
        positions = sum(one.row.num_positions for one in of_kind)
        entropy = sum(float(one.row.entropy_sums[0]) for one in of_kind) / positions
        ce = sum(one.row.ce_sum for one in of_kind) / positions
        size = sum(len(one.row.payload) for one in of_kind) / positions
        rows.append([kind, str(number), f"{positions:,}", f"{entropy:.3f}", f"{ce:.3f}", f"{size:.1f}"])
    head = ["kind of question", "examples", "positions", "entropy", "cross-entropy", "bytes a position"]
    surest, least = (
        cards([_card(one, background) for one in shown[:NUM_SHOWN]]) for shown in (found, found[::-1])
    )
    return [
        Section(f"Composition, of {len(found)} random examples", [table(head, rows)]),
        Section("Where the teacher is surest", [surest]),
        Section("Where it is least sure", [least]),
    ]


def _card(one: Shown, background: Background) -> str:
    values = {
        "question": one.example.question,
        "answer": one.example.answer,
        "teacher": f"entropy {one.entropy:.3f}, cross-entropy {one.cross_entropy:.3f} nats a position",
        "kept": f"{one.row.num_positions} positions, {len(one.row.payload)} bytes",
    }
    return card(one.example.image, values, background=background)

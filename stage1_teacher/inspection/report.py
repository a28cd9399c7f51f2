"""A cache as one HTML page: what it holds, how sure its teacher is, what that costs, and examples to look at.

    write_cache_report(CacheReader("work/caches/phantom"), recipe, Path("report.html"))

Figures are of a sample of the cache's rows; pictures need the data set that the cache was captured from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.cache import CacheReader
from shared.cache.inspect import Sample, inspect, sample_rows
from shared.errors import CacheFormatError, RecipeError, TeachonceError
from shared.recipes import Recipe, dump_recipe
from shared.reports.figures import Drawing
from shared.reports.page import Page, Section, write_page
from shared.reports.pieces import facts, figure, figures, grid, heading, paragraph, table
from shared.reports.recipe import recipe_pieces
from stage1_teacher.inspection.captures import capture_records
from stage1_teacher.inspection.examples import example_sections
from stage1_teacher.inspection.pictures import gains_of_answers, told
from stage1_teacher.inspection.plots import drawings

VERSIONS = ("teachonce", "torch", "transformers", "python", "commit", "gpu")


def write_cache_report(reader: CacheReader, recipe: Recipe | None, path: Path, *, seed: int = 0) -> None:
    """recipe  of the capture, whose data are shown; without one there are no examples

    Raises   CacheFormatError  when the cache has no positions
             RecipeError       when matplotlib is not installed, or the recipe is not one of a capture
    """
    if not reader.manifest.totals.positions:
        raise CacheFormatError(f"cache {reader.location}: it has no positions, there is nothing to report")
    if recipe is not None and (recipe.teacher is None or recipe.cache is None):
        raise RecipeError(
            f"recipe of run {recipe.run.name}: a report with examples needs a teacher and a cache section. Give the "
            "recipe of the capture (--recipe), or none"
        )
    summary, sample = inspect(reader), sample_rows(reader)
    drawn = drawings(sample)
    pictures = drawn.pop("visual_gain", None)
    sections = [
        Section(
            "What it is", [grid([facts(_identity(summary)), facts(_contents(summary) | _quality(summary))])]
        ),
        Section(
            "How sure the teacher is, and what that costs", [figures([figure(one) for one in drawn.values()])]
        ),
        *([] if pictures is None else [_pictures(reader, sample, pictures)]),
        *_examples(reader, recipe, seed=seed),
        Section("How it was captured", _captures(reader, recipe)),
    ]
    lead = (
        "Targets of a frozen teacher, kept by teachonce. Entropy says how sure the teacher is, cross-entropy how "
        "well it knows the answers. Both are in nats per position; a position is one token of an answer."
    )
    write_page(Page(f"Cache {reader.location}", sections, lead=lead), path)


def _pictures(reader: CacheReader, sample: Sample, drawing: Drawing) -> Section:
    assert reader.visual_gain is not None
    paragraphs = [paragraph(told(gains_of_answers(sample.rows), reader.visual_gain))]
    return Section("Which answers need their pictures", [*paragraphs, figures([figure(drawing)])])


def _examples(reader: CacheReader, recipe: Recipe | None, *, seed: int) -> list[Section]:
    """Examples, or the reason why there are none."""
    if recipe is None:
        return [Section("Examples", [paragraph("No recipe was given.")])]
    try:
        return example_sections(reader, recipe, seed=seed)
    except TeachonceError as error:
        return [Section("Examples", [paragraph(str(error))])]


def _captures(reader: CacheReader, recipe: Recipe | None) -> list[str]:
    """When, how long, with what; and the recipe of the newest capture."""
    records = capture_records(reader.location)
    pieces = []
    if records:
        head = ["ended", "took", "processes", "examples", "positions", *VERSIONS]
        pieces.append(table(head, [_capture(one) for one in records], caption="Captures, oldest first"))
    else:
        pieces.append(paragraph("The cache's log does not say: it was merged, or its log is gone."))
    tree = records[-1]["recipe"] if records else None if recipe is None else dump_recipe(recipe)
    if tree is not None:
        pieces += [heading("Recipe"), *recipe_pieces("capture", tree)]
    return pieces


def _capture(record: dict[str, Any]) -> list[str]:
    took = record.get("seconds")
    counts = [_count(record.get(name)) for name in ("ranks", "examples", "positions")]
    versions = [str(record.get(name) or "-") for name in VERSIONS]
    versions[VERSIONS.index("commit")] = versions[VERSIONS.index("commit")][:12]
    return [
        str(record.get("time", "-")),
        f"{took:,.0f} s" if isinstance(took, float | int) else "-",
        *counts,
        *versions,
    ]


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


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
        **_writers(identity["data"]),
    }


def _sources(data: list[dict[str, Any]]) -> dict[str, str]:
    """The data sets of each split: a merged cache has several."""
    found: dict[str, list[str]] = {}
    for part in data:
        found.setdefault(f"data, {part['split']}", []).append(f"{part['name']}: {part['rows']:,} rows")
    return {split: "; ".join(parts) for split, parts in found.items()}


def _writers(data: list[dict[str, Any]]) -> dict[str, str]:
    """Of answers that models wrote; nothing where there are none."""
    names = dict.fromkeys(name for part in data for name in part.get("written_by", ()))
    return {"answers written by": "; ".join(names)} if names else {}


def _contents(summary: dict[str, Any]) -> dict[str, str]:
    totals = summary["totals"]
    return {
        "examples": f"{totals['examples']:,}",
        "positions": f"{totals['positions']:,}",
        "entries": f"{totals['entries']:,}, {summary['entries_per_position']:.1f} per position",
        "size": f"{totals['bytes'] / 2**20:.2f} MiB in {summary['shards']} shard(s)",
        "bytes per position": f"{summary['bytes_per_position']:.1f}",
        "answers cut": f"{totals['truncated']:,}",
        "rows left out": f"{totals['skipped']:,}",
        "rows equal to an earlier one": f"{totals['duplicates']:,}",
    }


def _quality(summary: dict[str, Any]) -> dict[str, str]:
    sample = summary["sample"]
    mass = {
        f"kept mass, T = {t}": f"{values['mean']:.5f} on average" for t, values in sample["kept_mass"].items()
    }
    return {
        "sampled": f"{sample['rows']:,} rows, {sample['positions']:,} positions",
        **mass,
        **{f"teacher's entropy, T = {t}": f"{value:.3f} nats" for t, value in sample["entropy"].items()},
        "teacher's cross-entropy": f"{sample['cross_entropy']:.3f} nats",
    }

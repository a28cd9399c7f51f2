"""What is printed of a cache: by ``inspect``, ``verify``, ``audit``, ``report``, ``export`` and ``merge``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from shared.cache import CacheList, CacheMix, CacheReader
from shared.cache.export import export
from shared.cache.inspect import inspect
from shared.cache.layout import LOG_NAME
from shared.cache.manifest import load_manifest
from shared.cache.merge import merge
from shared.cache.storage import open_folder
from shared.cache.verify import Verification, verify
from shared.errors import CacheFormatError, CacheMismatchError, RecipeError
from shared.progress import progress
from shared.recipes import Recipe, load_recipe
from shared.recipes.files import apply_overrides, validate_tree
from shared.runtime import World, environment
from stage1_teacher.inspection.audit import audit
from stage1_teacher.inspection.audit import show as show_findings
from stage1_teacher.inspection.captures import capture_records
from stage1_teacher.inspection.plots import plot_cache
from stage1_teacher.inspection.report import write_cache_report


def show_inspection(locations: Sequence[str], *, as_json: bool, plots: Path | None = None) -> int:
    """Who taught, what is kept, how large it is; as pictures too, if there is a folder for them.

    Of several caches each, and whether a student may read them together.

    Raises   RecipeError  for pictures of several caches
    """
    if plots is not None and len(locations) > 1:
        raise RecipeError(f"--plots: it draws one cache, {len(locations)} are given. Inspect one at a time")
    summaries, drawn = [], []
    for location in locations:
        reader = CacheReader(location)
        drawn += [] if plots is None else plot_cache(reader, plots)
        summaries.append(inspect(reader))
    together = _together(locations) if len(locations) > 1 else None
    if as_json:
        told = summaries[0] if together is None else {"caches": summaries, "together": together}
        click.echo(json.dumps(told, indent=1))
    else:
        click.echo("\n\n".join("\n".join(_lines(summary)) for summary in summaries))
        if together is not None:
            click.echo("\n" + "\n".join(_lines_together(together)))
    for path in drawn:
        click.echo(path, err=as_json)
    return 0


def _together(locations: Sequence[str]) -> dict[str, Any]:
    """What the caches come to as a list, with and without one teacher for all, and as a mix: plain JSON types."""
    ways: dict[str, Callable[[], CacheList | CacheMix]] = {
        "list": lambda: CacheList(locations, duplicates="first"),
        "list_of_many_teachers": lambda: CacheList(locations, duplicates="first", teachers="many"),
        "mix": lambda: CacheMix(locations),
    }
    told: dict[str, Any] = {}
    for way, opened in ways.items():
        try:
            cache = opened()
        except CacheMismatchError as error:
            told[way] = {"refused": str(error)}
            continue
        told[way] = {"examples": len(cache), "teachers": list(cache.teacher_names)}
        if isinstance(cache, CacheList):
            told[way]["in_several"] = cache.num_in_several
    return told


def _lines_together(told: dict[str, Any]) -> list[str]:
    names = {
        "list": "cache.path, a list",
        "list_of_many_teachers": "the same, teachers: many",
        "mix": "cache.mix",
    }
    lines = []
    for way, label in names.items():
        found = told[way]
        if "refused" in found:
            lines.append(f"{label:<26} no: {found['refused']}")
            continue
        shared = found.get("in_several")
        twice = f", {shared} of them in several (cache.duplicates: first)" if shared else ""
        lines.append(f"{label:<26} {found['examples']} examples{twice}; {', '.join(found['teachers'])}")
    return lines


def show_verifications(locations: Sequence[str], *, sample: int | None = None, seed: int = 0) -> int:
    """Every fault of each cache; the status is that of a damaged cache if there is one."""
    return max([show_verification(location, sample=sample, seed=seed) for location in locations])


def show_verification(location: str, *, sample: int | None = None, seed: int = 0) -> int:
    """Every fault of a cache, or of some of its shards; the status is that of a damaged cache if there is one."""
    manifest = load_manifest(open_folder(location))
    num_shards = 0 if manifest is None else manifest.num_shards
    total = num_shards if sample is None else min(sample, num_shards)
    with progress(total=total, desc="verify", unit="shard", leave=False) as bar:
        found = verify(location, sample=sample, seed=seed, on_shard=lambda _: _advance(bar))
    for note in found.notes:
        click.echo(f"note: {note}")
    for fault in found.faults:
        click.echo(f"fault: {fault}", err=True)
    click.echo(f"{location}: {len(found.faults)} fault(s) in {_extent(found, sample, seed)}")
    return CacheFormatError.exit_status if found.faults else 0


def _extent(found: Verification, sample: int | None, seed: int) -> str:
    """How much of a cache was read."""
    if sample is None or sample >= found.num_shards:
        return f"{found.num_shards} shard(s)"
    share = found.checked_bytes / max(found.num_bytes, 1)
    return (
        f"{found.num_checked} of {found.num_shards} shards, drawn with seed {seed}: {share:.3%} of their bytes. "
        "The others were not read; manifest, lists and indices were"
    )


def show_audits(
    locations: Sequence[str],
    world: World,
    *,
    recipe_name: str | None,
    overrides: Sequence[str],
    num_examples: int | None,
    max_error: float | None,
    max_error_positions: int,
    seed: int,
    as_json: bool,
) -> int:
    """Each cache against its teacher; the status is that of a damaged cache if one is further off than allowed."""
    min_positions = 0 if max_error is None else max_error_positions
    audits, exceeded = [], []
    for location in locations:
        reader = CacheReader(location)
        recipe = _find_recipe(reader, recipe_name, overrides)
        found = audit(
            recipe, reader, world, num_examples=num_examples, min_positions=min_positions, seed=seed
        )
        audits.append(found)
        exceeded += [] if max_error is None else found.exceeds(max_error, num_positions=max_error_positions)
        if world.is_main and not as_json:
            show_findings(found)
    if world.is_main:
        if as_json:
            told = [found.to_json() for found in audits]
            click.echo(json.dumps(told[0] if len(told) == 1 else told, indent=1))
        for message in exceeded:
            click.echo(f"error: {message}", err=True)
    return CacheFormatError.exit_status if exceeded else 0


def show_report(location: str, out: Path, *, recipe_name: str | None, overrides: Sequence[str]) -> int:
    """A cache as an HTML page; without examples where no recipe says which data they are of."""
    reader = CacheReader(location)
    recipe = None
    try:
        recipe = _find_recipe(reader, recipe_name, overrides)
    except CacheFormatError as error:
        click.echo(f"note: {error}", err=True)
    write_cache_report(reader, recipe, out)
    click.echo(out)
    return 0


def recipe_of_cache(reader: CacheReader, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of the newest capture, from the cache's log, with ``section.key=value`` laid over it.

    Raises   CacheFormatError  when the log is not there or holds none, as in a merged cache
             RecipeError       when it does not fit the overrides
    """
    if records := capture_records(reader.location):
        tree = apply_overrides(records[-1]["recipe"], overrides, Recipe)
        return validate_tree(Recipe, tree, origin=f"cache {reader.location}, {LOG_NAME}")
    raise CacheFormatError(
        f"cache {reader.location}: its {LOG_NAME} does not hold the recipe it was captured with. Give it: --recipe"
    )


def _find_recipe(reader: CacheReader, name: str | None, overrides: Sequence[str]) -> Recipe:
    """The named recipe, or else that of the cache's capture."""
    return (
        recipe_of_cache(reader, overrides) if name is None else load_recipe(name, overrides=tuple(overrides))
    )


def show_export(location: str, out: str) -> int:
    """A cache as plain Parquet.

    Raises   RecipeError  for a remote place, which would become a local folder of that name
    """
    if "://" in out:
        raise RecipeError(
            f"export to {out}: a local folder is needed. Name one, and copy it there afterwards"
        )
    reader = CacheReader(location)
    with progress(total=len(reader.manifest.shards), desc="export", unit="shard", leave=False) as bar:
        number = export(reader, out, on_shard=lambda _: _advance(bar))
    click.echo(f"{out}: {number} examples as Parquet")
    return 0


def show_merge(sources: tuple[str, ...], out: str) -> int:
    """One cache of several."""
    facts = environment()
    versions = {name: str(facts[name]) for name in ("teachonce", "torch", "transformers")}
    manifest = merge(sources, out, created_by=versions)
    click.echo(f"{out}: {manifest.totals.examples} examples in {len(manifest.shards)} shard(s)")
    return 0


def _advance(bar: tqdm) -> None:
    bar.update()


def _lines(summary: dict[str, Any]) -> list[str]:
    identity, totals = summary["identity"], summary["totals"]
    teacher, targets = identity["teacher"], identity["targets"]
    lines = [
        f"cache      {summary['location']}, {summary['sha256'][:12]}",
        f"teacher    {teacher['name']}, {teacher['dtype']}, weights {teacher['weights_fingerprint'][:12]}",
        f"targets    {_plain(targets['policy'])}; seed {targets['seed']}{_also(targets)}",
        f"at         temperature {_plain(targets['temperatures'])}",
        *(f"data       {part['name']}, {part['split']}: {part['rows']} rows" for part in identity["data"]),
        *(f"written by {name}" for name in _writers(identity["data"])),
        f"holds      {totals['examples']} examples, {totals['positions']} positions, {totals['entries']} entries",
        f"size       {totals['bytes'] / 2**20:.2f} MiB in {summary['shards']} shard(s)",
    ]
    if totals["positions"]:
        lines.append(
            f"each       {summary['bytes_per_position']:.1f} bytes and {summary['entries_per_position']:.1f} "
            "entries a position"
        )
    lines.append(
        f"left out   {totals['skipped']}; cut {totals['truncated']}; equal rows {totals['duplicates']}"
    )
    lines += [f"           {number} x {reason}" for reason, number in summary["skipped"].items()]
    if sample := summary["sample"]:
        lines += [
            f"of {sample['rows']} rows, {sample['positions']} positions:",
            f"  entries a position        {_plain(sample['entries_per_position'])}",
            *(f"  kept mass at T = {t:<9} {_plain(mass)}" for t, mass in sample["kept_mass"].items()),
            f"  teacher's entropy         {_plain(sample['entropy'])} nats",
            f"  teacher's cross-entropy   {sample['cross_entropy']:.4f} nats",
        ]
    return lines


def _also(targets: dict[str, Any]) -> str:
    """What is kept beside the entries."""
    log_probs = "; log-probs of the labels" if targets.get("label_log_prob") else ""
    gain = targets.get("visual_gain")
    return log_probs + (f"; what the pictures give them, against pictures {gain}" if gain else "")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _writers(data: list[dict[str, Any]]) -> list[str]:
    """Of answers that models wrote, each once."""
    return list(dict.fromkeys(name for part in data for name in part.get("written_by", ())))

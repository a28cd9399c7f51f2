"""What is printed of a cache: by ``inspect``, ``verify``, ``audit``, ``report``, ``export`` and ``merge``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from shared.cache import CacheReader
from shared.cache.export import export
from shared.cache.inspect import inspect
from shared.cache.layout import LOG_NAME
from shared.cache.manifest import load_manifest
from shared.cache.merge import merge
from shared.cache.storage import open_folder
from shared.cache.verify import Verification, verify
from shared.errors import CacheFormatError, RecipeError
from shared.progress import progress
from shared.recipes import Recipe, load_recipe
from shared.recipes.files import apply_overrides, validate_tree
from shared.runtime import World, environment
from stage1_teacher.inspection.audit import audit
from stage1_teacher.inspection.audit import show as show_findings
from stage1_teacher.inspection.captures import capture_records
from stage1_teacher.inspection.plots import plot_cache
from stage1_teacher.inspection.report import write_cache_report


def show_inspection(location: str, *, as_json: bool, plots: Path | None = None) -> int:
    """Who taught, what is kept, how large it is; as pictures too, if there is a folder for them."""
    reader = CacheReader(location)
    drawn = [] if plots is None else plot_cache(reader, plots)
    summary = inspect(reader)
    click.echo(json.dumps(summary, indent=1) if as_json else "\n".join(_lines(summary)))
    for path in drawn:
        click.echo(path, err=as_json)
    return 0


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


def show_audit(
    location: str,
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
    """The cache against its teacher; the status is that of a damaged cache if it is further off than allowed."""
    reader = CacheReader(location)
    recipe = _find_recipe(reader, recipe_name, overrides)
    min_positions = 0 if max_error is None else max_error_positions
    found = audit(recipe, reader, world, num_examples=num_examples, min_positions=min_positions, seed=seed)
    exceeded = [] if max_error is None else found.exceeds(max_error, num_positions=max_error_positions)
    if world.is_main:
        if as_json:
            click.echo(json.dumps(found.to_json(), indent=1))
        else:
            show_findings(found)
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
    return "; log-probs of the labels" if targets.get("label_log_prob") else ""


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _writers(data: list[dict[str, Any]]) -> list[str]:
    """Of answers that models wrote, each once."""
    return list(dict.fromkeys(name for part in data for name in part.get("written_by", ())))

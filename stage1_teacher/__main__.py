"""The command line of stage one: ``teacher-cache``, or ``python -m stage1_teacher`` (under torchrun for more
than one process)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from shared.cli import (
    FOLDER,
    PAGE,
    PLACE,
    load_recipe,
    recipe_arguments,
    screen_has_unicode,
    version_option,
)
from shared.cli import run as run_group
from shared.stopping import stop_on_signals

SEEDS = click.IntRange(min=0, max=2**63 - 1)


class FiniteRange(click.FloatRange):
    """Of numbers only: in click's own, nan lies in every range, and inf in those without an end."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


@click.group()
@version_option
def commands() -> None:
    """Run a frozen teacher once and write its targets into a cache."""


@commands.command("capture")
@recipe_arguments
def capture(recipe: str, overrides: tuple[str, ...]) -> int:
    """Make the cache of RECIPE hold all its data; what is there already is not captured again."""
    from shared.runtime import distributed
    from stage1_teacher.capture import capture as run_capture

    loaded = load_recipe(recipe, overrides=overrides)
    with (
        distributed(collective_timeout_s=loaded.parallel.collective_timeout_s) as world,
        stop_on_signals() as stop,
    ):
        return run_capture(loaded, world, stop)


@commands.command("write")
@recipe_arguments
@click.option("--out", type=FOLDER, help="Folder of the answers; write.path by default.")
def write(recipe: str, overrides: tuple[str, ...], out: Path | None) -> int:
    """Let the teacher of RECIPE answer the prompts of its data: a data set that `capture` takes."""
    from shared.runtime import distributed
    from stage1_teacher.write import write as run_write

    loaded = load_recipe(recipe, overrides=overrides)
    with (
        distributed(collective_timeout_s=loaded.parallel.collective_timeout_s) as world,
        stop_on_signals() as stop,
    ):
        return run_write(loaded, world, stop, out=out)


@commands.command("check")
@recipe_arguments
@click.option(
    "--nproc", default=1, show_default=True, type=click.IntRange(min=1), help="Processes to plan for."
)
def check(recipe: str, overrides: tuple[str, ...], nproc: int) -> int:
    """Say what a capture of RECIPE would do and take, and everything that is wrong with it."""
    from stage1_teacher.check import check_recipe

    return check_recipe(load_recipe(recipe, overrides=overrides), num_ranks=nproc).show()


@commands.command("recipe")
@recipe_arguments
def recipe(recipe: str, overrides: tuple[str, ...]) -> int:
    """Print RECIPE as YAML, with every default written out."""
    from shared.recipes import recipe_text

    loaded = load_recipe(recipe, overrides=overrides)
    click.echo(recipe_text(loaded, allow_unicode=screen_has_unicode()), nl=False)
    return 0


@commands.command("estimate")
@recipe_arguments
@click.option("--examples", default=64, show_default=True, type=click.IntRange(min=1), help="Sample size.")
@click.option(
    "--nproc", type=click.IntRange(min=1), help="Devices to project for; by default those of one teacher."
)
@click.option(
    "--students", default=1, show_default=True, type=click.IntRange(min=1), help="Students to train."
)
@click.option(
    "--epochs", type=FiniteRange(min=0, min_open=True), help="Of each student; the recipe's by default."
)
@click.option(
    "--tau",
    "taus",
    multiple=True,
    type=FiniteRange(1e-6, 1),
    help="Also of this; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def estimate(
    recipe: str,
    overrides: tuple[str, ...],
    examples: int,
    nproc: int | None,
    students: int,
    epochs: float | None,
    taus: tuple[float, ...],
    as_json: bool,
) -> int:
    """Say, from a sample, how long a capture of RECIPE takes, how large its cache is, and when it pays."""
    from shared.runtime import distributed
    from stage1_teacher.estimate import TAUS, show
    from stage1_teacher.estimate import estimate as run_estimate

    with distributed() as world:
        found = run_estimate(
            load_recipe(recipe, overrides=overrides),
            world,
            num_examples=examples,
            num_ranks=nproc,
            num_students=students,
            num_epochs=epochs,
            taus=taus or TAUS,
        )
        if world.is_main and as_json:
            click.echo(json.dumps(found.to_json(), indent=1))
        elif world.is_main:
            show(found)
    return 0


@commands.command("audit")
@click.argument("caches", nargs=-1, required=True, type=PLACE)
@click.option(
    "--examples",
    type=click.IntRange(min=1),
    help="Sample size; by default as many as 4,096 positions need, from 64 to 256.",
)
@click.option("--recipe", help="Whose teacher and data to take; by default that of the cache's capture.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the recipe."
)
@click.option(
    "--max-error",
    type=FiniteRange(min=0),
    help="Of the head's gradient: above it the status is that of a damaged cache.",
)
@click.option(
    "--max-error-positions",
    default=512,
    show_default=True,
    type=click.Choice([64, 512, 4096]),
    help="Over how many positions the bound is; it is an error if the sample has fewer.",
)
@click.option("--seed", default=0, show_default=True, type=SEEDS, help="Of the sample.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def audit(
    caches: tuple[str, ...],
    examples: int | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    max_error: float | None,
    max_error_positions: int,
    seed: int,
    as_json: bool,
) -> int:
    """Run the teacher again over a sample of each of CACHES, and compare what it says with what is kept."""
    from shared.runtime import distributed
    from stage1_teacher.inspection.tools import show_audits

    with distributed() as world:
        return show_audits(
            caches,
            world,
            recipe_name=recipe,
            overrides=overrides,
            num_examples=examples,
            max_error=max_error,
            max_error_positions=max_error_positions,
            seed=seed,
            as_json=as_json,
        )


@commands.command("inspect")
@click.argument("caches", nargs=-1, required=True, type=PLACE)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--plots", type=FOLDER, help="Folder for pictures of it (extra `report`).")
def inspect(caches: tuple[str, ...], as_json: bool, plots: Path | None) -> int:
    """Say who taught each of CACHES, what it keeps and how large it is; of several, what they are together."""
    from stage1_teacher.inspection.tools import show_inspection

    return show_inspection(caches, as_json=as_json, plots=plots)


@commands.command("report")
@click.argument("cache", type=PLACE)
@click.argument("out", type=PAGE)
@click.option("--recipe", help="Whose data to show; by default that of the cache's capture.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the recipe."
)
def report(cache: str, out: Path, recipe: str | None, overrides: tuple[str, ...]) -> int:
    """Write OUT, one HTML file about CACHE, with pictures of examples (extra `report`)."""
    from stage1_teacher.inspection.tools import show_report

    return show_report(cache, out, recipe_name=recipe, overrides=overrides)


@commands.command("verify")
@click.argument("caches", nargs=-1, required=True, type=PLACE)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    help="Read so many shards of each, drawn at random; by default all.",
)
@click.option("--seed", default=0, show_default=True, type=SEEDS, help="Of the sample.")
def verify(caches: tuple[str, ...], sample: int | None, seed: int) -> int:
    """Read every byte of CACHES, or of a sample of their shards, and list every fault."""
    from stage1_teacher.inspection.tools import show_verifications

    return show_verifications(caches, sample=sample, seed=seed)


@commands.command("export")
@click.argument("cache", type=PLACE)
@click.argument("out", type=PLACE)
def export(cache: str, out: str) -> int:
    """Write CACHE to the new folder OUT as plain Parquet: ids, log-probs and weights as lists."""
    from stage1_teacher.inspection.tools import show_export

    return show_export(cache, out)


@commands.command("merge")
@click.argument("caches", nargs=-1, required=True, type=PLACE)
@click.argument("out", type=PLACE)
def merge(caches: tuple[str, ...], out: str) -> int:
    """Join CACHES that were captured apart, alike, into the new cache OUT."""
    from stage1_teacher.inspection.tools import show_merge

    return show_merge(caches, out)


def main() -> None:
    run_group(commands, goes_on=("capture", "write"))


if __name__ == "__main__":
    main()

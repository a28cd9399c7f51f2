"""What came out of a run: one table on the screen, one file that says the run is finished."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import click

from shared.cache import CacheMix
from shared.recipes import Recipe
from shared.runtime import World
from shared.vouched import vouched
from stage2_student.evaluation.answers import ModelSource, answers_of
from stage2_student.evaluation.evaluate import cut_answers, default_split, evaluate, exported_step
from stage2_student.evaluation.evaluated import STUDENT, Evaluated
from stage2_student.evaluation.final_table import final_table
from stage2_student.evaluation.scores import keep
from stage2_student.runs.files import write_json
from stage2_student.runs.run_folder import RunFolder
from stage2_student.training.dropped import by_row, dropped_so_far
from stage2_student.training.inputs import Inputs
from stage2_student.training.survey import Survey

LOSSES = ("loss", "ce_loss", "kd_loss", "kl", "teacher_ce_loss", "soft_ce")  # of a validation; logs lack some


def summarize(
    recipe: Recipe, inputs: Inputs, folder: RunFolder, world: World, *, step: int
) -> dict[str, Any]:
    """Lets the exported student answer questions, and writes ``results.json``; called by all ranks.

    What is finished is written first: ``unanswered`` says then why there are no answers, and --resume asks again.
    """
    results = _results(recipe, inputs, folder, step=step) | {"answers": None, "unanswered": None}
    results["shuffled_pictures"] = None
    asks = bool(recipe.run.export and recipe.evaluation.max_examples)
    student, begin = None, time.perf_counter()
    if asks:
        _write(folder, results | {"unanswered": "it was not asked yet"}, world)
        try:
            student = _answering(recipe, inputs, folder, world)
            shuffled = _with_other_pictures(recipe, inputs, folder, world)
        except Exception as error:
            _write(folder, results | {"unanswered": str(error) or type(error).__name__}, world)
            if world.is_main:
                print_summary(recipe, results)
                click.echo(
                    f"note: training is finished and kept, but the student could not answer questions. "
                    f"`train-student evaluate {folder.path}` asks it again"
                )
            raise
        results["answers"] = student.to_json()
        results["shuffled_pictures"] = shuffled
    results["times_s"]["answering"] = time.perf_counter() - begin
    if world.is_main and student is not None:
        keep([student], folder.evaluation, default_split(recipe))
    _write(folder, results, world)
    return results


def _write(folder: RunFolder, results: dict[str, Any], world: World) -> None:
    if world.is_main:
        write_json(folder.results, vouched(results))


def _answering(recipe: Recipe, inputs: Inputs, folder: RunFolder, world: World) -> Evaluated:
    """The student's answers, without losses: the last validation has them."""
    answers = answers_of(
        recipe,
        ModelSource.student(recipe, str(folder.export)),
        world,
        split=default_split(recipe),
        num_examples=recipe.evaluation.max_examples,
        found=_readable(inputs, folder, world),
    )
    export = str(folder.export)
    return Evaluated(STUDENT, export, tuple(answers), step=exported_step(export))


def _readable(inputs: Inputs, folder: RunFolder, world: World) -> Survey:
    """The examples to ask about, without those that were left out on the way."""
    survey = inputs.validation or inputs.train
    reasons = world.by_main(lambda: dropped_so_far(folder.read_metrics(), survey.split.name))
    return survey.without([row for row in by_row(survey, reasons) if isinstance(row, int)])


def _with_other_pictures(
    recipe: Recipe, inputs: Inputs, folder: RunFolder, world: World
) -> dict[str, Any] | None:
    """CE and answers of the student when its pictures are shuffled; None where the recipe does not ask."""
    if not recipe.evaluation.shuffled_pictures:
        return None
    (found,) = evaluate(
        recipe,
        {STUDENT: ModelSource.student(recipe, str(folder.export))},
        world,
        split=default_split(recipe),
        num_examples=recipe.evaluation.max_examples,
        found=_readable(inputs, folder, world),
        shuffle_pictures=True,
    )
    return found.to_json()


def print_summary(recipe: Recipe, results: dict[str, Any]) -> None:
    """For people: the table, what the cache weighs, where the time went, where the student is."""
    click.echo(f"\nrun {results['run']}: {results['step']} steps")
    for line in final_table(recipe, results):
        click.echo(line)
    num_cut = (results["answers"] or {}).get("num_cut")
    if num_cut:
        click.echo(f"  {cut_answers('student', num_cut, results['answers']['num_examples'])}")
    if results["cache"]:
        cache = results["cache"]
        click.echo(f"  cache       {cache['bytes_per_position']:.1f} bytes a position, {cache['path']}")
    if coverage := results.get("coverage"):
        told = f"{coverage['shared_positions']:.1%} of positions, {coverage['shared_mass']:.1%} of the mass there"
        click.echo(f"  shared      {told} (student.other_vocabulary)")
    times = ", ".join(f"{name} {value:.0f} s" for name, value in results["times_s"].items())
    click.echo(
        f"  times       {times}; {results['positions_per_s']:.0f} positions/s, "
        f"data wait {results['data_wait']:.1%}"
    )
    if results["export"]:
        click.echo(f"  student     {results['export']}")


def _results(recipe: Recipe, inputs: Inputs, folder: RunFolder, *, step: int) -> dict[str, Any]:
    metrics = folder.read_metrics()
    best = folder.checkpoints.best()
    return {
        "run": recipe.run.name,
        "step": step,
        "before": _losses(metrics.validations, at=0),
        "after": _losses(metrics.validations, at=step),
        "best_step": best.facts.step if best else None,
        "num_skipped_steps": sum(not record["updated"] for record in metrics.steps),
        "dropped_rows": [
            reason
            for one in inputs.surveys().values()
            for reason in (*one.dropped, *by_row(one, dropped_so_far(metrics, one.split.name)).values())
        ],
        "validation": None if inputs.validation is None else inputs.validation.fingerprint,
        "cache": _cache(inputs),
        "coverage": _coverage(metrics.validations or metrics.steps),
        "positions_per_s": metrics.positions_per_s or 0.0,
        "data_wait": metrics.wait_s / max(metrics.training_s, 1e-9),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "times_s": {
            "training": metrics.training_s,
            "validation": sum(record["validation_s"] for record in metrics.validations),
            "answering": 0.0,
        },
        "export": str(folder.export) if recipe.run.export else None,
    }


def _losses(validations: list[dict[str, Any]], *, at: int) -> dict[str, float | None] | None:
    found = [record for record in validations if record["step"] == at]
    return {name: found[-1].get(name) for name in LOSSES} if found else None


def _coverage(records: list[dict[str, Any]]) -> dict[str, float] | None:
    """By targets of a teacher with another tokenizer, of the last of these; None where there is no such teacher."""
    names = ("shared_positions", "shared_mass")
    return {name: records[-1][name] for name in names} if records and names[0] in records[-1] else None


def _cache(inputs: Inputs) -> dict[str, Any] | None:
    if inputs.cache is None:
        return None
    cache = inputs.cache
    totals = [part.manifest.totals for part in cache.parts]
    count = max if isinstance(cache, CacheMix) else sum  # the caches of a mix hold the same positions
    positions, num_bytes = count(one.positions for one in totals), sum(one.bytes for one in totals)
    return {
        "path": cache.location,
        "sha256": cache.fingerprint,
        "positions": positions,
        "bytes": num_bytes,
        "bytes_per_position": num_bytes / max(1, positions),
    }

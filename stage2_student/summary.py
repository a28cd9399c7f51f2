"""What came out of a run: one table on the screen, one file that says the run is finished."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from shared.config import Recipe
from shared.runtime import World
from stage2_student.evaluate import evaluate_folder
from stage2_student.files import write_json, write_text
from stage2_student.inputs import Inputs
from stage2_student.run_folder import RunFolder


def summarize(
    recipe: Recipe, inputs: Inputs, folder: RunFolder, world: World, *, step: int
) -> dict[str, Any]:
    """Lets the exported student answer questions, and writes ``results.json``; called by all ranks."""
    begin = time.perf_counter()
    answers = None
    if recipe.evaluation.max_examples and recipe.run.export:
        rows = (inputs.validation or inputs.train).rows
        answers = evaluate_folder(recipe, folder.export, world, rows=rows)
    answering_s = time.perf_counter() - begin
    results = _results(recipe, inputs, folder, step=step)
    results["answers"] = None if answers is None else answers.summary()
    results["times_s"]["answering"] = answering_s
    if world.is_main:
        if answers is not None:
            lines = [json.dumps(vars(one), ensure_ascii=False) for one in answers.answers]
            write_text(folder.path / "answers.jsonl", "\n".join(lines) + "\n")
        write_json(folder.results, results)
    return results


def print_summary(results: dict[str, Any]) -> None:
    """A table for people."""
    click.echo(f"\nrun {results['run']}: {results['step']} steps")
    before, after = results["before"], results["after"]
    for name, label in [("loss", "loss"), ("ce_loss", "CE"), ("kd_loss", "KD")]:
        if before and after and after[name] is not None:
            click.echo(f"  validation {label:<5} {before[name]:8.4f} -> {after[name]:8.4f} nats a position")
    answers = results["answers"]
    if answers and answers["accuracy"] is not None:
        click.echo(f"  short answers    {answers['accuracy']:8.1%} right, of {answers['num_short']}")
    if results["cache"]:
        cache = results["cache"]
        click.echo(f"  cache            {cache['bytes_per_position']:8.1f} bytes a position, {cache['path']}")
    times = results["times_s"]
    click.echo("  times            " + ", ".join(f"{name} {value:.0f} s" for name, value in times.items()))
    click.echo(
        f"  throughput       {results['positions_per_s']:8.0f} positions/s, "
        f"data wait {results['data_wait']:.1%}"
    )
    if results["export"]:
        click.echo(f"  student          {results['export']}")


def _results(recipe: Recipe, inputs: Inputs, folder: RunFolder, *, step: int) -> dict[str, Any]:
    metrics = folder.read_metrics()
    best = folder.checkpoints.best()
    return {
        "run": recipe.run.name,
        "step": step,
        "before": _losses(metrics.validations, at=0),
        "after": _losses(metrics.validations, at=step),
        "best_step": best.facts.step if best and best.facts.validation_loss is not None else None,
        "num_skipped_steps": sum(not record["updated"] for record in metrics.steps),
        "dropped_rows": [*inputs.train.dropped, *(inputs.validation.dropped if inputs.validation else ())],
        "cache": _cache(inputs),
        "positions_per_s": metrics.positions_per_s or 0.0,
        "data_wait": metrics.wait_s / max(metrics.training_s, 1e-9),
        "times_s": {
            "training": metrics.training_s,
            "validation": sum(record["validation_s"] for record in metrics.validations),
        },
        "export": str(folder.export) if recipe.run.export else None,
    }


def _losses(validations: list[dict[str, Any]], *, at: int) -> dict[str, float | None] | None:
    found = [record for record in validations if record["step"] == at]
    return {name: found[-1][name] for name in ("loss", "ce_loss", "kd_loss")} if found else None


def _cache(inputs: Inputs) -> dict[str, Any] | None:
    if inputs.cache is None:
        return None
    manifest = inputs.cache.manifest
    return {
        "path": inputs.cache.location,
        "sha256": manifest.sha256,
        "positions": manifest.totals.positions,
        "bytes": manifest.totals.bytes,
        "bytes_per_position": manifest.totals.bytes / max(1, manifest.totals.positions),
    }

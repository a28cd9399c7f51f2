"""Runs as one HTML page: curves, costs, the table of ``compare``, and answers beside their pictures.

write_run_report([read_run(Path("work/runs/phantom"))], Path("report.html"))
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from shared.config import Recipe, Split, load_recipe
from shared.errors import TeachonceError
from shared.html_report import Page, Section, card, cards, figure, figures, paragraph, table, write_page
from shared.vqa import open_split
from stage2_student.compare import RunRecord, cache_uses, points, results
from stage2_student.run_folder import RunFolder

NUM_ANSWERS = 12
LEGEND = {"facecolor": "white", "edgecolor": "none", "framealpha": 0.8}
SMOOTHED = 0.02  # of the steps: the width of the running mean over training losses


def write_run_report(runs: Sequence[RunRecord], path: Path) -> None:
    """Raises   RecipeError  when matplotlib is not installed"""
    head, rows = results(runs)
    sections = [
        Section("Results", [table(head, rows)]),
        Section("Losses, nats a position", [figures(_loss_figures(runs))]),
        Section("The run itself", [figures(_cost_figures(runs))]),
    ]
    uses = cache_uses(runs)
    if uses:
        sections.append(Section("When the cache has paid", [paragraph(use.line()) for use in uses]))
    sections += [_answers(run) for run in runs]
    names = ", ".join(run.name for run in runs)
    write_page(Page(f"Students: {names}" if len(runs) > 1 else f"Student {names}", sections), path)


def _loss_figures(runs: Sequence[RunRecord]) -> list[str]:
    wanted = [("ce_loss", "Cross-entropy"), ("kd_loss", "Divergence from the teacher")]
    return [
        figure(
            partial(_draw_losses, runs=runs, field=field),
            f"{label}: validation (points) and training (lines).",
        )
        for field, label in wanted
        if any(record.get(field) is not None for run in runs for record in run.records)
    ]


def _cost_figures(runs: Sequence[RunRecord]) -> list[str]:
    wanted = [
        ("learning_rate", "Learning rate", 1.0),
        ("grad_norm", "Norm of the gradient, before it is clipped", 1.0),
        ("positions_per_s", "Positions a second", 1.0),
        ("data_wait", "Share of time spent waiting for data (%)", 100.0),
    ]
    return [
        figure(partial(_draw_steps, runs=runs, field=field, factor=factor), label)
        for field, label, factor in wanted
    ]


def _draw_losses(axes: Any, *, runs: Sequence[RunRecord], field: str) -> None:
    for number, run in enumerate(runs):
        color = f"C{number}"  # of a run, the same in every figure
        steps = points(run, "step", field)
        validations = points(run, "validation", field)
        if validations:
            axes.plot(*zip(*validations, strict=True), "o-", markersize=4, label=run.name, color=color)
        if steps:
            axes.plot(*zip(*_running_mean(steps), strict=True), linewidth=0.8, alpha=0.6, color=color)
    axes.set(xlabel="step", ylabel="nats a position")
    if axes.lines:
        axes.legend(**LEGEND)


def _draw_steps(axes: Any, *, runs: Sequence[RunRecord], field: str, factor: float) -> None:
    for number, run in enumerate(runs):
        scaled = [(step, value * factor) for step, value in points(run, "step", field)]
        if scaled:
            axes.plot(*zip(*scaled, strict=True), linewidth=0.9, label=run.name, color=f"C{number}")
    axes.set(xlabel="step")
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(**LEGEND)


def _running_mean(values: list[tuple[int, float]]) -> list[tuple[int, float]]:
    width = max(1, round(len(values) * SMOOTHED))
    windows = (values[max(0, i - width) : i + width + 1] for i in range(len(values)))
    return [
        (step, statistics.fmean(value for _, value in window))
        for (step, _), window in zip(values, windows, strict=True)
    ]


def _answers(run: RunRecord) -> Section:
    """Answers that were predicted: by ``evaluate`` if it was run, else those at the end of training."""
    title = f"Answers of {run.name}"
    try:
        found = predicted(run)
        if not found:
            return Section(title, [paragraph("None were asked: `train-student evaluate` does.")])
        recipe = load_recipe(RunFolder(run.path).recipe)
        return Section(title, [cards(_answer_cards(recipe, found))])
    except TeachonceError as error:
        return Section(title, [paragraph(str(error))])


def predicted(run: RunRecord) -> dict[tuple[Split, int], dict[str, str]]:
    """By split and row: what each model answered; the run's own student first."""
    found: dict[tuple[Split, int], dict[str, str]] = {}
    for path in sorted((run.path / "evaluation").glob("*.parquet")):
        split: Split = path.stem  # type: ignore[assignment]
        for line in pq.read_table(path).to_pylist():
            found.setdefault((split, line["row"]), {})[line["model"]] = line["answer"]
    own = run.path / "answers.jsonl"
    if not found and own.exists():
        split = "validation" if run.settings.get("data.splits.validation") is not None else "train"
        for text in own.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            found[split, line["row"]] = {"student": line["answer"]}
    return found


def _answer_cards(recipe: Recipe, found: dict[tuple[Split, int], dict[str, str]]) -> list[str]:
    pieces = []
    every = max(1, len(found) // NUM_ANSWERS)
    for split, row in sorted(found)[::every][:NUM_ANSWERS]:
        example = open_split(recipe.data, split)[row]
        values = {"question": example.question, "reference": example.answer} | found[split, row]
        pieces.append(card(example.image, values))
    return pieces

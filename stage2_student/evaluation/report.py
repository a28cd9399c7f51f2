"""Runs as one HTML page: curves, costs, the table of ``compare``, and answers beside their pictures.

write_run_report([read_run(Path("work/runs/phantom"))], Path("report.html"))
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq

from shared.data.rows import open_split
from shared.errors import TeachonceError
from shared.recipes import Recipe, Split, load_recipe
from shared.reports.page import Page, Section, card, cards, figure, figures, paragraph, table, write_page
from stage2_student.evaluation.answer_metrics import Interval
from stage2_student.evaluation.cache_uses import cache_uses
from stage2_student.evaluation.compare import results
from stage2_student.evaluation.evaluated import LABELS
from stage2_student.evaluation.run_records import RunRecord, labels, points
from stage2_student.evaluation.scores import read_scores
from stage2_student.runs.run_folder import RunFolder

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
    sections += [_answers(label, run) for label, run in zip(labels(runs), runs, strict=True)]
    names = ", ".join(labels(runs))
    write_page(Page(f"Students: {names}" if len(runs) > 1 else f"Student {names}", sections), path)


def _loss_figures(runs: Sequence[RunRecord]) -> list[str]:
    wanted = [("ce_loss", "Cross-entropy"), ("kl", "Divergence from the teacher")]
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
    for number, (label, run) in enumerate(zip(labels(runs), runs, strict=True)):
        color = f"C{number}"  # of a run, the same in every figure
        steps = points(run, "step", field)
        validations = points(run, "validation", field)
        if validations:
            axes.plot(*zip(*validations, strict=True), "o-", markersize=4, label=label, color=color)
        if steps:
            axes.plot(*zip(*_running_mean(steps), strict=True), linewidth=0.8, alpha=0.6, color=color)
    axes.set(xlabel="step", ylabel="nats a position")
    if axes.lines:
        axes.legend(**LEGEND)


def _draw_steps(axes: Any, *, runs: Sequence[RunRecord], field: str, factor: float) -> None:
    for number, (label, run) in enumerate(zip(labels(runs), runs, strict=True)):
        scaled = [(step, value * factor) for step, value in points(run, "step", field)]
        if scaled:
            axes.plot(*zip(*scaled, strict=True), linewidth=0.9, label=label, color=f"C{number}")
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


def _answers(label: str, run: RunRecord) -> Section:
    """What was asked at the end of training, or later by ``evaluate``: scores, and answers beside their pictures."""
    folder = RunFolder(run.path)
    try:
        files = [path for path in sorted(folder.evaluation.glob("*.parquet")) if path.stem in get_args(Split)]
        recipe = load_recipe(folder.recipe)
        pieces = [piece for path in files for piece in _asked(recipe, path)]
    except TeachonceError as error:
        pieces = [paragraph(str(error))]
    none = [paragraph("None were asked: `train-student evaluate` does.")]
    return Section(f"Answers of {label}", pieces or none)


def _asked(recipe: Recipe, path: Path) -> list[str]:
    """Of one split: a table of scores, and some questions with what each model answered."""
    head = ["", "questions", *LABELS.values(), "CE", "KL"]
    rows = [
        [
            one["model"],
            str(one["num_examples"]),
            *(Interval(**one[name]).text() if one[name] else "-" for name in LABELS),
            *("-" if one[name] is None else f"{one[name]:.4f}" for name in ("ce", "kl")),
        ]
        for one in read_scores(path)
    ]
    by_row: dict[int, list[dict[str, Any]]] = {}
    for line in pq.read_table(path).to_pylist():
        by_row.setdefault(line["row"], []).append(line)
    every = max(1, len(by_row) // NUM_ANSWERS)
    chosen = [by_row[row] for row in sorted(by_row)[::every][:NUM_ANSWERS]]
    shown = [found for lines in chosen if (found := _card(recipe, lines)) is not None]
    pieces = [paragraph(f"Split {path.stem}; 95 % intervals over pictures."), table(head, rows)]
    if len(shown) < len(chosen):
        pieces.append(paragraph(f"{len(chosen) - len(shown)} picture(s) are not those of the data any more."))
    return [*pieces, cards(shown)]


def _card(recipe: Recipe, lines: list[dict[str, Any]]) -> str | None:
    """A question with its picture, if the data still have it in that row."""
    asked = lines[0]
    examples = open_split(recipe.data, asked["split"])
    if not asked["row"] < len(examples):
        return None
    image = examples[asked["row"]].image
    if hashlib.sha256(image).hexdigest() != asked["image_sha256"]:
        return None
    values = {"question": asked["question"], "reference": asked["reference"]}
    values |= {line["model"]: line["answer"] for line in lines}
    return card(image, values, background=recipe.data.background)

"""Runs as one HTML page: results, curves, answers beside their pictures, and what they were made with.

write_run_report([read_run(Path("work/runs/phantom"))], Path("report.html"))
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.recipes import yaml12
from shared.regular_files import read_regular
from shared.reports.page import Page, Section, write_page
from shared.reports.pieces import figure, figures, key, paragraph, table
from shared.reports.recipe import recipe_pieces
from stage2_student.evaluation.cache_uses import cache_uses
from stage2_student.evaluation.compare import by_teacher, legend, results
from stage2_student.evaluation.curves import calibration_drawing, cost_drawings, loss_drawings
from stage2_student.evaluation.group_curves import group_drawings
from stage2_student.evaluation.questions import answer_sections
from stage2_student.evaluation.run_records import RunRecord, labels
from stage2_student.evaluation.sweep_curves import sweep_drawings
from stage2_student.runs.run_folder import RunFolder

VERSIONS = ("teachonce", "torch", "transformers", "python", "commit", "gpu", "num_ranks")
LEAD = (
    "Students by teachonce. CE is the cross-entropy with the labels, KL the distance from the teacher; both in nats "
    "per position, lower is better. A position is one token of an answer."
)


def write_run_report(runs: Sequence[RunRecord], path: Path) -> None:
    """Raises   RecipeError  when matplotlib is not installed"""
    head, rows = results(runs)
    names = labels(runs)
    told = [paragraph(line) for line in legend(runs)]
    sections = [Section("Results", [table(head, rows, caption="At the end of training"), *told])]
    head, rows = by_teacher(runs)
    if rows:
        caption = "Over the positions of the validation split whose targets are of that teacher"
        sections.append(Section("By teacher", [table(head, rows, caption=caption)]))
    if swept := sweep_drawings(runs):
        sections.append(Section("What each setting does", [figures(list(map(figure, swept)))]))
    losses = list(loss_drawings(runs).values())
    calibration = calibration_drawing(runs)
    learned = [*losses, *group_drawings(runs), *([] if calibration is None else [calibration])]
    sections += [
        Section("Learning", [key(names), figures(list(map(figure, learned)))]),
        *answer_sections(runs),
        Section("The training itself", [key(names), figures(list(map(figure, cost_drawings(runs))))]),
    ]
    uses = cache_uses(runs)
    if uses:
        sections.append(Section("When the cache has paid", [paragraph(use.line()) for use in uses]))
    sections.append(Section("How it was made", _made(runs)))
    title = f"Student {names[0]}" if len(runs) == 1 else f"{len(runs)} students"
    write_page(Page(title, sections, lead=LEAD), path)


def _made(runs: Sequence[RunRecord]) -> list[str]:
    """When, how long, with what, by which recipe."""
    head = ["run", "began", "ended", "training", "validation", "answering", *VERSIONS[:-1], "processes"]
    rows = [[name, *_facts(run)] for name, run in zip(labels(runs), runs, strict=True)]
    pieces = [table(head, rows, caption="When, how long, with which versions")]
    for name, run in zip(labels(runs), runs, strict=True):
        pieces += recipe_pieces(name, yaml12.load(read_regular(RunFolder(run.path).recipe).decode()))
    return pieces


def _facts(run: RunRecord) -> list[str]:
    environment = _object(run.path / "environment.json")
    done = _object(run.path / "results.json")
    times = done.get("times_s") or {}
    versions = [str(environment.get(name) or "-")[:24] for name in VERSIONS]
    seconds = [_seconds(times.get(name)) for name in ("training", "validation", "answering")]
    return [str(environment.get("began") or "-"), str(done.get("ended") or "-"), *seconds, *versions]


def _object(path: Path) -> dict[str, Any]:
    """Empty where the file is missing or damaged: what it says is worth a cell, not a report."""
    try:
        found = json.loads(read_regular(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _seconds(value: Any) -> str:
    return f"{value:,.0f} s" if isinstance(value, int | float) else "-"

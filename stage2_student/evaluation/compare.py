"""Runs side by side: the settings in which they differ, what they came to, and what their scores rest on.

runs = read_runs([Path("work/runs/soft"), Path("work/runs/hard")])
click.echo("\\n".join([*table(runs), *legend(runs)]))
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.regular_files import write_output
from stage2_student.evaluation.cache_uses import cache_uses
from stage2_student.evaluation.evaluated import STUDENT, TEACHER
from stage2_student.evaluation.run_records import RunRecord, labels, teacher_ce_of
from stage2_student.evaluation.scores import Scores
from stage2_student.runs.files import finite

UNIMPORTANT = ("run.name", "run.root", "bootstrap.")  # differ by nature, or make what is named elsewhere
FIRST_KEYS = {"teacher": "teacher.model", "cache": "cache.path"}  # of sections that a recipe may lack
MAX_SHOWN = 40  # characters of a value


def differing(runs: Sequence[RunRecord]) -> list[str]:
    """The settings that not all runs share, names left out; of a section that some lack, its first key alone."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if not key.startswith(UNIMPORTANT))
    lacking = [section for section in FIRST_KEYS if any(section in run.settings for run in runs)]
    hidden = tuple(f"{section}." for section in lacking)
    shown = [
        key
        for key in keys
        if key not in lacking and (not key.startswith(hidden) or key in FIRST_KEYS.values())
    ]
    return [key for key in shown if len({json.dumps(run.settings.get(key)) for run in runs}) > 1]


def results(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """The head of a table, and the cells of each run, and below them of each teacher of which something is known."""
    settings = differing(runs)
    cut = ["cut"] if any(run.scores.get("num_cut") for run in runs) else []
    soft = ["soft CE"] if any(run.losses["soft_ce"] is not None for run in runs) else []
    head = ["run", *settings, "steps", "epochs", "CE", "KL", *soft, "questions", "right", "F1", *cut]
    head += ["positions/s", "step", "memory"]
    rows = [
        [
            label if run.is_finished else f"{label} (not finished)",
            *(_plain(run.settings.get(key)) for key in settings),
            str(run.num_steps),
            _number(run.num_epochs, ".2f"),
            _number(run.losses["ce_loss"], ".4f"),
            _number(run.losses["kl"], ".4f"),
            *(_number(run.losses["soft_ce"], ".4f") for _ in soft),
            *_answered(run.asked, STUDENT, with_cut=bool(cut)),
            _number(run.positions_per_s, ".0f"),
            _number(run.step_s, ".3f", " s"),
            _number(run.peak_memory_gib, ".2f", " GiB"),
        ]
        for label, run in zip(labels(runs), runs, strict=True)
    ]
    for name, ce, asked in _teachers(runs):
        cells = [
            _number(ce, ".4f"),
            "-",
            *("-" for _ in soft),
            *_answered(asked, TEACHER, with_cut=bool(cut)),
        ]
        rows.append([f"teacher {name}", *["-"] * (len(settings) + 2), *cells, *["-"] * 3])
    return head, rows


def _answered(asked: Scores | None, model: str, *, with_cut: bool) -> list[str]:
    """Cells of one model's answers: what was asked, the share that is right, F1, and how many were cut."""
    if asked is None or model not in asked.models:
        return ["-"] * (3 + with_cut)
    scores = asked.models[model]
    right, f1 = scores.get("accuracy"), scores.get("token_f1")
    cells = [
        f"{scores['num_examples']}, {asked.split}",
        f"{right['mean']:.1%} of {right['count']}" if right else "-",
        _number((f1 or {}).get("mean"), ".1%"),
    ]
    return [*cells, str(scores.get("num_cut", "-"))] if with_cut else cells


def _teachers(runs: Sequence[RunRecord]) -> list[tuple[str, float | None, Scores | None]]:
    """Name, CE and scores of each teacher of the runs, where one of the two is known."""
    found = []
    for name in dict.fromkeys(run.settings.get("teacher.model") for run in runs):
        of_it = [run for run in runs if name is not None and run.settings.get("teacher.model") == name]
        ce = teacher_ce_of(of_it)
        asked = next((run.asked for run in of_it if run.asked and TEACHER in run.asked.models), None)
        if ce is not None or asked is not None:
            found.append((_plain(name), ce, asked))
    return found


def table(runs: Sequence[RunRecord]) -> list[str]:
    """The results in Markdown, one line a run."""
    return _markdown(*results(runs))


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(map(_cell, cells))} |" for cells in (head, ["---"] * len(head), *rows)]


def by_teacher(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """The head of a table, and a line for each teacher of a run that had several; none where no run had."""
    head = ["run", "teacher", "positions", "CE", "KL", "teacher's CE"]
    rows = []
    for label, run in zip(labels(runs), runs, strict=True):
        found = run.last_validation.get("by_teacher") or {}
        nothing = [None] * len(found.get("names", ()))
        columns = [found.get(name, nothing) for name in ("names", "positions", "ce", "kl", "teacher_ce")]
        rows += [
            [label, str(name), str(positions), *(_number(one, ".4f") for one in losses)]
            for name, positions, *losses in zip(*columns, strict=True)
        ]
    return head, rows


def table_by_teacher(runs: Sequence[RunRecord]) -> list[str]:
    """The same in Markdown, after an empty line; nothing where no run had several teachers."""
    head, rows = by_teacher(runs)
    return ["", *_markdown(head, rows)] if rows else []


def legend(runs: Sequence[RunRecord]) -> list[str]:
    """What the columns are, and what keeps the runs from being like."""
    lines = [
        "CE and KL: nats a position over the whole validation split; KL to the teacher, at temperature 1 for all, of "
        "a top_k or top_p cache a lower bound.",
        "questions: how many were asked, and of which split; right: of those with short answers; F1: of all.",
    ]
    if any(run.losses["soft_ce"] is not None for run in runs):
        lines.append(
            "soft CE: cross-entropy with a teacher of another tokenizer at temperature 1, where both have a token "
            "boundary, nats a unit of its mass. Between students of one tokenizer it differs as their KL does."
        )
    if any(run.is_mix for run in runs):
        lines.append(
            "KL of a mix of caches: the mean of the KLs to its teachers, by their weights. Where teachers differ, no "
            "student reaches zero."
        )
    if len({run.asked.questions for run in runs if run.asked is not None}) > 1:
        lines.append(
            "note: the runs were not asked the same questions, so their answers cannot be compared. "
            "`train-student evaluate RUN --examples N` asks each the same N"
        )
    fewer = [
        f"{label} has {run.answered[0].num_examples}"
        for label, run in zip(labels(runs), runs, strict=True)
        if run.asked is not None and run.asked.num_examples < run.answered[0].num_examples
    ]
    if fewer:
        lines.append(
            f"note: shown for the questions that all were asked; more were answered: {', '.join(fewer)}"
        )
    return lines


def is_comparison(told: Any) -> bool:
    """Whether ``save`` wrote it."""
    return isinstance(told, dict) and told.keys() >= {"runs", "caches"}


def save(runs: Sequence[RunRecord], path: Path) -> None:
    """Rows and break-even as JSON; ``break_even_epochs`` is null where a cache never pays."""
    uses = [
        asdict(use) | {"break_even_epochs": use.costs.to_json()["break_even_epochs"]}
        for use in cache_uses(runs)
    ]
    told = {"runs": [run.to_json() for run in runs], "caches": uses}
    write_output(path, (json.dumps(finite(told), indent=2) + "\n").encode())


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _cell(text: str) -> str:
    """Of a Markdown table: what would end the cell or its line is escaped."""
    marked = text.replace("\\", "\\\\").replace("|", "\\|")
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in marked)


def _plain(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_SHOWN else f"...{text[-MAX_SHOWN:]}"
